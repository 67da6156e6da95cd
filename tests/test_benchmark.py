"""The benchmark times what it says, and the plan for a GPU counts what a step does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.config import Config
from manage.network import build_network, load_hierarchy
from tests.conftest import REPO
from tests.factory import make_data, write_config
from tools.benchmark import STAGES, Row, Setting, in_turns, seconds
from tools.gpu_plan import CARDS, Counter, Part, count_step, plan_table

SMALL = {"crop_size": 64, "batch_size": 2, "pretrained": False}


def test_the_first_round_is_not_counted_and_a_row_shows_median_lowest_and_highest() -> None:
    calls = []
    assert len(seconds(lambda: calls.append(1), rounds=3)) == len(calls) - 1 == 3
    assert Row("step", "photos/s", [4.0, 1.0, 2.0]).cells() == ["step", "2 photos/s", "1 to 4"]


def test_two_checkouts_take_turns_and_are_compared_within_rounds(tmp_path: Path) -> None:
    ours, theirs, order = tmp_path / "a", tmp_path / "b", []

    def measure(checkout: Path, number: int) -> float:
        order.append((checkout.name, number))
        return {"a": 6.0, "b": 3.0}[checkout.name] * (number + 1)

    rows = in_turns(Setting(Config(), tmp_path, 2, [ours, theirs]), measure, "epoch", "photos/s")
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [row.values for row in rows] == [[6, 12], [3, 6], [2, 2]]
    assert len(in_turns(Setting(Config(), tmp_path, 2, [ours]), measure, "epoch", "photos/s")) == 1


# ---- the plan for a GPU ------------------------------------------------------------------------------------------


def test_an_operation_counts_what_it_reads_and_writes_and_a_view_nothing() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.float16)
    with Counter() as counter:
        counter.enter("sum")
        (a + b).view(15)
        counter.enter("product")
        torch.mm(a, a.t())
    assert counter.parts["sum"].operations == [(15 * 4 + 15 * 2 + 15 * 4, 0)]
    assert [flops for _, flops in counter.parts["product"].operations] == [2 * 3 * 5 * 3]
    # a bound takes the slower of moving and computing
    assert Part([(10, 0), (1, 40)]).seconds(peak=20, bandwidth=5) == 2 + 2


def test_a_step_has_the_flops_of_network_and_backward() -> None:
    config = Config(**SMALL)
    network = build_network(config, load_hierarchy(config))
    with FlopCounterMode(display=False) as flops:
        network(torch.zeros(2, 3, 64, 64)).sum().backward()
    assert sum(part.flops for part in count_step(config).values()) == flops.get_total_flops()


def test_launches_do_not_depend_on_the_size_and_bytes_do() -> None:
    small, large = (count_step(Config(**SMALL | {"batch_size": n, "criterion": "tree_min"})) for n in (2, 8))
    assert small.keys() == large.keys() >= {"network, forward", "loss, forward", "loss, backward"}
    for name, part in small.items():
        assert len(part.operations) == len(large[name].operations)
    assert large["loss, forward"].bytes == pytest.approx(4 * small["loss, forward"].bytes, rel=0.01)
    assert len(small["loss, forward"].operations + small["loss, backward"].operations) < 250


def test_the_plan_is_a_table_with_a_column_a_card() -> None:
    rows = [line for line in plan_table(Config(**SMALL)).splitlines() if line.startswith("|")]
    assert all(card in rows[0] for card in CARDS)
    assert len({row.count("|") for row in rows}) == 1


# ---- the tool ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_stages_run_on_the_data_of_a_config(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=8, val=3)
    cfg, out = write_config(tmp_path, data), tmp_path / "out.json"
    stages = [name for name in STAGES if name != "evaluation"]  # three more processes, started the same way
    command = [sys.executable, "tools/benchmark.py", "--cfg", cfg, "--rounds", "1", "--json", out, "--only", *stages]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert len(record["rows"]) > len(stages)
    for row in record["rows"]:
        assert row["values"][0] > 0
        assert row["title"] in done.stdout
    assert record["environment"]["hardware"]
    assert not (tmp_path / "experiments").exists()  # it writes elsewhere
