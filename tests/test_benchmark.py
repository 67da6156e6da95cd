"""The benchmark times what it says, and the plan for a GPU counts what a step does."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.config import Config
from docs.figures.gpu_plan import CARDS, Counter, count_step, plan_table
from manage.network import build_network, load_hierarchy
from tests.factory import make_data, write_config
from tools import benchmark


def test_the_first_round_is_not_counted_and_a_row_shows_median_lowest_and_highest() -> None:
    calls = []
    assert len(benchmark.rates(lambda: calls.append(1), photos=5, rounds=3)) == len(calls) - 1 == 3
    assert benchmark.table_row("step", [4.0, 1.0, 2.0]) == "| step | 2 | 1 to 4 |"


def test_an_operation_counts_what_it_reads_and_writes_and_a_view_nothing() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.float16)
    with Counter() as counter:
        (a + b).view(15)
        torch.mm(a, a.t())
    assert counter.operations == [(15 * 4 + 15 * 2 + 15 * 4, 0), (15 * 4 + 15 * 4 + 9 * 4, 2 * 3 * 5 * 3)]
    counter.operations = [(10, 0), (1, 40)]
    assert counter.seconds(peak=20, bandwidth=5) == 2 + 2  # the slower of moving and computing


def test_a_step_has_the_flops_of_network_and_backward(slim) -> None:
    config = Config(crop_size=32, batch_size=2, pretrained=False)
    network = build_network(config, load_hierarchy(config))
    with FlopCounterMode(display=False) as flops:
        network(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert sum(count for _, count in count_step(config).operations) == flops.get_total_flops()
    assert all(card in plan_table(config) for card in CARDS)


def test_the_benchmark_runs_on_the_data_of_a_config(slim, tmp_path, monkeypatch, capsys) -> None:
    cfg = write_config(tmp_path, make_data(tmp_path / "data"))
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--cfg", str(cfg), "--rounds", "1"])
    benchmark.main()
    told = capsys.readouterr().out
    assert all(title in told for title in ("training step", "criterion", "decode alone", "kept photos", "hardware: "))
    assert not (tmp_path / "experiments").exists()
