"""The runner of experiments: what is refused, chosen and skipped, and real tiny runs that are cut off and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from configs.config import DECODE_RULES, load_config
from tests.factory import REPO, make_data, write_config
from tests.test_compare import fake_experiment
from tools import experiment as tool
from tools.experiment import Job, choices, final_runs
from tools.experiment_runs import Entry, Run, read_entries
from utils.errors import UserError
from utils.hierarchy import Hierarchy

SHIPPED = sorted((REPO / "configs" / "experiments").glob("*.json"))


def write_runs(folder: Path, *entries: dict, **keys) -> Path:
    path = folder / "trial.json"
    path.write_text(json.dumps({"runs": list(entries)} | keys))
    return path


def entry(tmp_path: Path, **keys) -> dict:
    overrides = {"root_dir": str(tmp_path), "root_data_dir": "data", "n_epochs": 3}
    return {"name": "bce", "cfg": "configs/quickstart.json", "overrides": overrides, "seeds": [0, 1]} | keys


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_no_configs(path: Path) -> None:
    assert read_entries(path)
    with pytest.raises(UserError, match="unknown key"):
        load_config(path)


def test_the_arguments_of_a_run_give_back_its_config(tmp_path: Path) -> None:
    overrides = {"root_dir": str(tmp_path), "criterion": {"tree_min": 1, "bce": 0.5}, "short_side": None}
    (runs,) = [e.finals({}) for e in read_entries(write_runs(tmp_path, entry(tmp_path, overrides=overrides)))]
    assert names(runs) == ["trial_bce_seed0", "trial_bce_seed1"]
    for run in runs:
        _, cfg, *given = run.arguments
        assert load_config(REPO / cfg, given) == run.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, r"runs\[0\]: 'seeds' is \[\]; expected a list of different whole numbers"),
        ({"seeds": [0, 0]}, "list of different whole numbers"),
        ({"seeds": [True]}, "list of different whole numbers"),
        ({"seeds": [-1]}, "run 'bce': .*key 'seed': expected at least 0"),
        ({"seed": [0]}, "unknown key 'seed'; known keys are cfg, name, overrides, search, seeds"),
        ({"name": "a/b"}, "'name' is 'a/b'"),
        ({"overrides": {"seed": 1}}, "other than exp_name and seed"),
        ({"overrides": {"lrr": 1}}, "run 'bce': .*unknown key 'lrr'; did you mean 'lr'"),
        ({"search": {"lrr": [1]}}, "unknown key 'lrr'"),
        ({"search": {"lr": 0.1}}, "'search' is .*; expected values to try"),
        ({"search": "ce"}, "'search' is 'ce', no run that searches"),
        ({"cfg": "configs/nothing.json"}, "no such file"),
        ({"cfg": "configs/experiments/losses_cpu.json"}, "unknown key 'cfg'"),
        ({"cfg": 3}, "expected the path of a config"),
    ],
)
def test_a_mistake_is_named_before_the_first_run(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_entries(write_runs(tmp_path, entry(tmp_path) | change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a JSON object with the keys cfg, overrides, runs, search, seeds"),
        ({"runs": []}, "at least one run"),
        ({}, "is missing the key 'runs'"),
        ({"runs": [{"name": "a", "cfg": "configs/quickstart.json", "seeds": [0]}] * 2}, "two runs have this name"),
    ],
)
def test_mistakes_of_the_whole_file_are_named(tmp_path: Path, content, message: str) -> None:
    (tmp_path / "trial.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_entries(tmp_path / "trial.json")


def names(runs: list[Run]) -> list[str]:
    return [run.config.exp_name for run in runs]


def searching(tmp_path: Path) -> list[Entry]:
    """One run that tries two rates, and one that takes its choice."""
    runs = [entry(tmp_path), entry(tmp_path, name="ce", search="bce", seeds=[4])]
    return read_entries(write_runs(tmp_path, *runs, search={"lr": [0.001, 0.002]}))


def test_the_better_rate_and_rule_are_chosen_once_all_tries_are_scored(tmp_path: Path, tree: Hierarchy) -> None:
    bce, ce = searching(tmp_path)
    assert final_runs([bce, ce], choices([bce, ce])) == []
    for run, quality in zip(bce.tries(), (0.4, 0.6), strict=True):
        assert bce.choice() is None
        keys = {k: v for k, v in run.config.to_dict().items() if k not in ("exp_name", "seed", "root_dir", "n_epochs")}
        folder = fake_experiment(tmp_path, tree, run.config.exp_name, quality, evaluation="last", **keys)
        path = folder / "evaluation" / "last" / "scores.json"
        record = json.loads(path.read_text())
        record["rules"]["leaf"]["mIoU1"] += 0.1 if quality == 0.6 else -0.1
        path.write_text(json.dumps(record))
    assert bce.choice() == {"lr": 0.002, "decode": "leaf", "root_bias": {}}
    runs = final_runs([bce, ce], choices([bce, ce]))
    assert names(runs) == ["trial_bce_seed0", "trial_ce_seed4", "trial_bce_seed1"]
    assert {(run.config.lr, run.config.decode, run.config.train_sample_ids_file) for run in runs} == {
        (0.002, "leaf", "train_id.txt")
    }


def test_tries_train_without_a_sixth_and_are_scored_on_it(tmp_path: Path) -> None:
    ids = [f"p{i:02}" for i in range(20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_id.txt").write_text("\n".join(ids))
    bce, ce = searching(tmp_path)
    bce.logs.mkdir(parents=True)
    bce.write_lists(), ce.write_lists()
    assert ce.tries() == []
    kept, held_out = (bce.tries()[0].config.ids_file(split).read_text().split() for split in ("train", "val"))
    assert len(held_out) == 3
    assert sorted(kept + held_out) == ids
    assert [*(tmp_path / "data").iterdir()] == [tmp_path / "data" / "train_id.txt"]  # it may be read-only


def test_what_stands_beside_the_runs_holds_for_all_and_a_run_adds_to_it(tmp_path: Path) -> None:
    shared = entry(tmp_path, search={"lr": [0.1]}, overrides={"n_epochs": 3, "lr": 0.2})
    del shared["name"]
    runs = [{"name": "a"}, {"name": "b", "overrides": {"lr": 0.3}, "seeds": [7], "search": None}]
    a, b = read_entries(write_runs(tmp_path, *runs, **shared))
    assert (a.seeds, a.search, a.overrides) == ([0, 1], {"lr": [0.1]}, {"n_epochs": 3, "lr": 0.2})
    assert (b.seeds, b.search, b.overrides) == ([7], None, {"n_epochs": 3, "lr": 0.3})


def finished(tmp_path: Path, tree: Hierarchy, **changes) -> Entry:
    """The scores of seed 0 at its last epoch, with some values of scores.json changed."""
    folder = fake_experiment(tmp_path, tree, "trial_bce_seed0", 0.5, evaluation="last")
    path = folder / "evaluation" / "last" / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "defaults.json").write_text("{}")
    overrides = {"root_dir": str(tmp_path), "n_epochs": 3}
    return read_entries(
        write_runs(tmp_path, entry(tmp_path, cfg=str(tmp_path / "defaults.json"), overrides=overrides))
    )[0]


def test_a_run_is_finished_when_its_last_epoch_is_scored_as_its_config_decodes(tmp_path: Path, tree: Hierarchy) -> None:
    own = finished(tmp_path / "a", tree)
    assert [run.scored() is not None for run in own.finals({})] == [True, False]
    assert own.run("seed0", {"decode": "leaf", "seed": 0}).scored() is None
    with pytest.raises(UserError, match=r"exists with another config \(lr differ\)"):
        own.finals({"lr": 0.5})[0].scored()
    assert finished(tmp_path / "b", tree, epoch=2).finals({})[0].scored() is None
    assert finished(tmp_path / "c", tree, root_bias={"body": 0.5}).finals({})[0].scored() is None
    few = own.run("few", {"n_val_photos": 7})
    train, evaluate = Job(few, 1, tmp_path).commands  # goes on from its checkpoint if there is one
    assert (train[0], *train[-2:]) == ("train.py", "--resume", "auto")
    assert [[text for text in command if "n_val" in text] for command in (train, evaluate)] == [
        ["n_val_photos=7"],
        ["n_val_photos=null"],  # which are all
    ]


def test_a_report_holds_what_is_finished_and_counts_the_rest(tmp_path: Path, tree: Hierarchy, monkeypatch) -> None:
    path = write_runs(tmp_path, entry(tmp_path))
    monkeypatch.setattr("sys.argv", ["experiment.py", str(path), "--only-report", "--out", str(tmp_path / "docs")])
    with pytest.raises(UserError, match="no run is finished"):
        tool.main()
    finished(tmp_path, tree)
    tool.main()
    assert "1 runs are not finished." in (tmp_path / "docs" / "experiments.md").read_text()
    assert json.loads((tmp_path / "docs" / "experiments.json").read_text())["groups"]["bce"][0]["seed"] == 0


def start(path: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "tools" / "experiment.py"), str(path), "--out", str(path.parent / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def epochs(root: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in root.glob("experiments/*/metrics.jsonl"))


@pytest.mark.slow
def test_a_runner_that_is_stopped_and_killed_goes_on_and_a_run_that_fails_stops_no_other(tmp_path: Path) -> None:
    """Stopped, its trainings save and end; killed, they go on alone, and the next runner waits for them."""
    make_data(tmp_path / "data", train=12, val=2)
    cfg = write_config(tmp_path, tmp_path / "data", n_epochs=4, encoder="mobilenet_v3_small")
    runs = [
        {"name": "tm", "search": {"lr": [0.001]}},
        {"name": "bad", "overrides": {"val_sample_ids_file": "nothing.txt"}},
        {"name": "ce", "overrides": {"criterion": "ce"}},
    ]
    path = write_runs(tmp_path, *runs, cfg=str(cfg), seeds=[0])
    for end, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before, runner = epochs(tmp_path), start(path)
        while epochs(tmp_path) == before and runner.poll() is None:
            time.sleep(0.02)
        if end is signal.SIGTERM:
            with pytest.raises(UserError, match="is in use by process"):
                tool.run_all(Namespace(file=path, take_over=False), read_entries(path))
        runner.send_signal(end)
        output, _ = runner.communicate(timeout=120)
        assert runner.returncode == status, output
    runner = start(path, "--jobs", "2")
    output, _ = runner.communicate(timeout=240)
    assert runner.returncode == 1, output
    assert "trial_bad_seed0: ended with status 2, see" in output
    assert "finished trial_ce_seed0" in output
    assert epochs(tmp_path) == 12  # of the try and of two runs; none was counted twice
    kept = {str(path.relative_to(tmp_path / "experiments")) for path in tmp_path.glob("experiments/*/*/*.pt")}
    assert kept == {f"trial_{name}_seed0/models_checkpoints/last.pt" for name in ("tm", "ce")}
    scores = json.loads((tmp_path / "experiments/trial_tm_seed0/evaluation/last/scores.json").read_text())
    assert (scores["epoch"], set(scores["rules"])) == (4, set(DECODE_RULES))
    assert "Chosen for tm on the held-out photos: lr 0.001" in (tmp_path / "out" / "experiments.md").read_text()
    photos = Image.open(tmp_path / "out" / "experiments_photos.jpg")  # photo, truth, two networks; two photos
    assert photos.width == 4 * 204
    assert photos.height > 2 * 204
