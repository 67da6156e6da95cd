"""The runner of experiments: what is refused, chosen and skipped, and real tiny runs that are cut off and go on."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.config import DECODE_RULES, load_config
from tests.factory import REPO, make_data, write_config
from tests.test_compare import fake_experiment
from tools import experiment as tool
from tools.experiment import Runner, choices, final_runs
from tools.experiment_runs import Entry, read_entries
from utils.errors import UserError
from utils.hierarchy import Hierarchy


def write_runs(folder: Path, *entries: dict, **keys) -> Path:
    path = folder / "trial.json"
    path.write_text(json.dumps({"runs": list(entries)} | keys))
    return path


def entry(tmp_path: Path, **keys) -> dict:
    overrides = {"root_dir": str(tmp_path), "root_data_dir": "data", "n_epochs": 3}
    return {"name": "bce", "cfg": "configs/quickstart.json", "overrides": overrides, "seeds": [0, 1]} | keys


@pytest.mark.parametrize("path", sorted((REPO / "configs/experiments").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_the_arguments_of_a_run_give_back_its_config(path: Path) -> None:
    for one in read_entries(path):
        for run in (*one.tries(), *one.finals({"criterion": {"ce": 1, "bce": 0.5}})):
            _, cfg, *given = run.arguments
            assert load_config(REPO / cfg, given) == run.config
    with pytest.raises(UserError, match="unknown key"):
        load_config(path)


MISTAKES = {  # a change of a run, and what is said of it
    "seeds twice": ({"seeds": [0, 0]}, "two runs would be 'trial_bce_seed0'"),
    "a seed below 0": ({"seeds": [-1]}, "run 'bce': .*key 'seed'"),
    "no list": ({"seeds": 3}, r"runs\[0\]: 'seeds' is 3; .* python tools/experiment.py --help"),
    "unknown": ({"seed": [0]}, r"'seed' is \[0\]; known keys are name, cfg, overrides, seeds, search"),
    "a folder": ({"name": "a/b"}, "'exp_name'"),
    "a seed too many": ({"overrides": {"seed": 1}}, "'overrides' is {\"seed\": 1"),
    "a config key": ({"overrides": {"lrr": 1}}, "run 'bce': .*unknown key 'lrr'; did you mean 'lr'"),
    "a searched key": ({"search": {"lrr": [1]}}, "unknown key 'lrr'"),
    "no values": ({"search": {"lr": 0.1}}, "'search' is "),
    "a searched seed": ({"search": {"seed": [1]}}, "'search' is {\"seed\": "),
    "no seeds": ({"seeds": [], "search": {"lr": [1]}}, r"'seeds' is \[\]"),
    "no config": ({"cfg": "configs/nothing.json"}, "no such file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_before_the_first_run(tmp_path: Path, case: str) -> None:
    change, message = MISTAKES[case]
    with pytest.raises(UserError, match=message):
        read_entries(write_runs(tmp_path, entry(tmp_path) | change))
    with pytest.raises(UserError, match="at least one run"):
        read_entries(write_runs(tmp_path))


def searching(tmp_path: Path) -> list[Entry]:
    """One run that tries two rates, and one that tries nothing."""
    runs = [entry(tmp_path, search={"lr": [0.001, 0.002]}), entry(tmp_path, name="ce", seeds=[4])]
    return read_entries(write_runs(tmp_path, *runs))


def test_the_better_rate_and_rule_are_chosen_once_all_tries_are_scored(tmp_path: Path, tree: Hierarchy) -> None:
    bce, ce = searching(tmp_path)
    assert [run.entry for run in final_runs([bce, ce], choices([bce, ce]))] == ["ce"]
    odd = read_entries(write_runs(tmp_path, entry(tmp_path, search={"scale_jitter": [[0.5, 2.0]]})))[0]
    assert [run.config.exp_name for run in odd.tries()] == ["trial_bce_try_scale_jitter-0.5-2.0-"]
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
    assert [run.config.exp_name for run in runs] == ["trial_bce_seed0", "trial_ce_seed4", "trial_bce_seed1"]
    assert {(run.config.lr, run.config.decode, run.config.train_sample_ids_file) for run in runs[::2]} == {
        (0.002, "leaf", "train_id.txt")
    }


def test_a_run_is_finished_when_its_last_epoch_is_scored_as_its_config_decodes(tmp_path: Path, tree: Hierarchy) -> None:
    (tmp_path / "defaults.json").write_text("{}")
    overrides = {"root_dir": str(tmp_path), "n_epochs": 3}
    own = read_entries(write_runs(tmp_path, entry(tmp_path, cfg=str(tmp_path / "defaults.json"), overrides=overrides)))
    path = fake_experiment(tmp_path, tree, "trial_bce_seed0", 0.5, evaluation="last") / "evaluation/last/scores.json"
    run, other = own[0].finals({})
    assert (run.scored() is not None, other.scored()) == (True, None)
    assert own[0].run("seed0", {"decode": "leaf", "seed": 0}).scored() is None
    with pytest.raises(UserError, match=r"exists with another config \(lr differ\)"):
        own[0].finals({"lr": 0.5})[0].scored()
    record = json.loads(path.read_text())
    for change in ({"epoch": 2}, {"root_bias": {"body": 0.5}}, {"tta": "flip"}):
        path.write_text(json.dumps(record | change))
        assert run.scored() is None


def fake_run(folder: Path, name: str, code: str) -> SimpleNamespace:
    """A run whose training is some code of Python's, and which has no evaluation."""
    config, is_scored = SimpleNamespace(exp_name=name, experiment_dir=folder / name), iter([None, True])
    commands, scored = [["-c", code]], is_scored.__next__  # not before, but after
    return SimpleNamespace(config=config, scored=scored, commands=lambda take_over: commands, tidy=lambda: None)


def when(is_true, action) -> None:
    """Waits beside the test, then acts."""

    def wait() -> None:
        while not is_true():
            time.sleep(0.02)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_a_run_that_fails_stops_no_other_and_a_signal_ends_what_runs_and_starts_no_more(tmp_path: Path) -> None:
    runner = Runner(2, tmp_path, take_over=False)
    runner.run([fake_run(tmp_path, "bad", "exit(3)"), fake_run(tmp_path, "good", "print('well')")])
    assert runner.faults == [f"bad: ended with status 3, see {tmp_path / 'bad.log'}"]
    assert (tmp_path / "good.log").read_text().endswith("\nwell\n")
    runner, log = Runner(1, tmp_path, take_over=False), tmp_path / "first.log"
    sleeping = "import time; print(1, flush=True); time.sleep(99)"
    runs = [fake_run(tmp_path, "first", sleeping), fake_run(tmp_path, "b", "")]
    when(lambda: log.exists() and log.read_text().endswith("\n1\n"), lambda: runner.stop(signal.SIGTERM, None))
    with pytest.raises(SystemExit) as stopped:
        runner.run(runs)
    assert stopped.value.code == 143
    assert (tmp_path / "b.log").read_text() == ""


@pytest.mark.slow
def test_a_training_outlives_a_killed_runner_and_the_next_one_waits_for_it_and_finishes(tmp_path: Path, monkeypatch):
    make_data(tmp_path / "data", train=12, val=2)
    cfg = write_config(tmp_path, tmp_path / "data", n_epochs=2, encoder="mobilenet_v3_small", val_every=2)
    path = write_runs(tmp_path, {"name": "tm", "search": {"lr": [0.001]}}, cfg=str(cfg), seeds=[0])
    arguments = [str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["experiment.py", *arguments])
    with subprocess.Popen([sys.executable, REPO / "tools/experiment.py", *arguments], cwd=REPO) as runner:
        when(lambda: any(tmp_path.glob("experiments/*/.owner.json")), runner.kill)  # a training has begun
    assert tool.main() == 0
    lines = [file.read_text().splitlines() for file in tmp_path.glob("experiments/*/metrics.jsonl")]
    assert [len(epochs) for epochs in lines] == [2, 2], "the try and the run; no epoch was trained twice"
    kept = {str(path.relative_to(tmp_path / "experiments")) for path in tmp_path.glob("experiments/*/*/*.pt")}
    assert kept == {f"trial_tm_{run}/models_checkpoints/last.pt" for run in ("try_lr0.001", "seed0")}
    logs = tmp_path / "experiments/logs/trial"
    tried, held_out = ((logs / f"tm_{split}.txt").read_text().split() for split in ("train", "val"))
    assert (len(held_out), sorted(tried + held_out)) == (2, (tmp_path / "data/train_id.txt").read_text().split())
    scores = json.loads((tmp_path / "experiments/trial_tm_seed0/evaluation/last/scores.json").read_text())
    assert (scores["epoch"], set(scores["rules"])) == (2, set(DECODE_RULES))
    assert "Chosen for tm on the held-out photos: lr 0.001" in (tmp_path / "out" / "experiments.md").read_text()
