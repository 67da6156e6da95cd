"""The runner of experiments: what is refused, what is skipped, and real tiny runs that are cut off and go on."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.config import DECODE_RULES, load_config
from manage.checkpoint import checkpoint_digest, pack
from tests.factory import REPO, make_data, write_config
from tests.test_compare import fake_experiment
from tools import experiment as tool
from tools.experiment import Run, Runner, read_runs
from utils.errors import UserError
from utils.files import write_whole
from utils.hierarchy import Hierarchy

SHIPPED = sorted((REPO / "configs" / "experiments").glob("*.json"))


def write_runs(folder: Path, *entries: dict, name: str = "trial", **keys) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"runs": list(entries)} | keys))
    return path


def entry(tmp_path: Path, **keys) -> dict:
    overrides = {"root_dir": str(tmp_path), "n_epochs": 3}
    return {"name": "bce", "cfg": "configs/quickstart.json", "overrides": overrides, "seeds": [0, 1]} | keys


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid(path: Path) -> None:
    _, runs = read_runs(path)
    assert runs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_file_of_runs_is_no_config(path: Path) -> None:
    with pytest.raises(UserError, match="unknown key"):
        load_config(path)


def test_every_seed_is_a_run_with_its_own_experiment(tmp_path: Path) -> None:
    checkpoint, runs = read_runs(write_runs(tmp_path, entry(tmp_path)))
    assert checkpoint == "last"
    assert [(run.config.exp_name, run.config.seed) for run in runs] == [("trial_bce_seed0", 0), ("trial_bce_seed1", 1)]
    assert {run.config.n_epochs for run in runs} == {3}


def test_the_command_of_a_run_gives_back_its_config(tmp_path: Path) -> None:
    overrides = {"root_dir": str(tmp_path), "criterion": {"tree_min": 1, "bce": 0.5}, "short_side": None}
    _, runs = read_runs(write_runs(tmp_path, entry(tmp_path, overrides=overrides)))
    flag, cfg, *given = runs[0].arguments
    assert flag == "--cfg"
    assert load_config(REPO / cfg, given) == runs[0].config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, r"runs\[0\] \(bce\): 'seeds' is \[\]"),
        ({"seeds": [0, 0]}, "list of different whole numbers"),
        ({"seeds": [True]}, "list of different whole numbers"),
        ({"seeds": [-1]}, "key 'seed': expected at least 0"),
        ({"seed": [0]}, "unknown key 'seed'; known keys are cfg, name, overrides, seeds"),
        ({"name": "a/b"}, "'name' is 'a/b'"),
        ({"overrides": {"seed": 1}}, "other than exp_name and seed"),
        ({"overrides": {"lrr": 1}}, r"runs\[0\] \(bce\), .*unknown key 'lrr'; did you mean 'lr'"),
        ({"cfg": "configs/nothing.json"}, "no such file"),
        ({"cfg": "configs/experiments/losses_cpu.json"}, "is not a config"),
        ({"cfg": 3}, "expected the path of a config"),
    ],
)
def test_a_mistake_is_named_before_the_first_run(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_runs(write_runs(tmp_path, entry(tmp_path) | change))


def test_mistakes_of_the_whole_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        read_runs(write_runs(tmp_path))
    with pytest.raises(UserError, match="two runs are called 'trial_bce_seed0'"):
        read_runs(write_runs(tmp_path, entry(tmp_path), entry(tmp_path)))
    with pytest.raises(UserError, match="expected best, last or checkpoint_<epoch>"):
        read_runs(write_runs(tmp_path, entry(tmp_path), checkpoint="../x"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object with the keys checkpoint, runs"):
        read_runs(tmp_path / "list.json")


def test_an_experiment_with_another_config_is_not_gone_on_with(tmp_path: Path) -> None:
    path = write_runs(tmp_path, entry(tmp_path))
    run = read_runs(path)[1][0]
    folder = run.config.experiment_dir / "configs"
    folder.mkdir(parents=True)
    (folder / "trial_bce_seed0.json").write_text(json.dumps(run.config.to_dict() | {"lr": 0.5}))
    with pytest.raises(UserError, match=r"exists with another config \(lr differ\)"):
        read_runs(path)


# ---- what is run -------------------------------------------------------------------------------------------------


class Recorder(Runner):
    """Writes down what would be started; every call succeeds and does nothing."""

    def _call(self, script: str, run: Run, options) -> int:
        self.calls = [*getattr(self, "calls", []), (script, run.config.exp_name, *options)]
        return 0


def fake_run(tmp_path: Path, tree: Hierarchy, seeds: list[int]) -> Path:
    """A file of runs, whose experiment of seed 0 is evaluated at its last epoch."""
    fake_experiment(tmp_path, tree, "trial_bce_seed0", 0.5, 0)
    overrides = {"root_dir": str(tmp_path), "n_epochs": 3}
    config = {"name": "bce", "cfg": str(tmp_path / "defaults.json"), "overrides": overrides, "seeds": seeds}
    (tmp_path / "defaults.json").write_text("{}")
    return write_runs(tmp_path, config, checkpoint="best")


def test_finished_runs_are_skipped_and_others_trained_and_scored(tmp_path: Path, tree: Hierarchy) -> None:
    _, runs = read_runs(fake_run(tmp_path, tree, [0, 1]))
    runner = Recorder(runs, "best", 1, tmp_path)
    faults = runner.run()
    options = ("--checkpoint", "best", "--decode", "all", "--no-pictures")
    assert runner.calls == [("train.py", "trial_bce_seed1"), ("evaluate.py", "trial_bce_seed1", *options)]
    assert len(faults) == 1  # it did nothing, which is seen
    assert "trial_bce_seed1: evaluation ended" in faults[0]


def test_a_run_that_was_cut_off_is_resumed(tmp_path: Path, tree: Hierarchy) -> None:
    _, runs = read_runs(fake_run(tmp_path, tree, [0]))
    (runs[0].config.experiment_dir / "evaluation" / "best" / "scores.json").unlink()
    runner = Recorder(runs, "best", 1, tmp_path)
    runner.run()
    assert runner.calls[0] == ("train.py", "trial_bce_seed0", "--resume")


def test_a_trained_run_without_scores_is_only_evaluated(tmp_path: Path, tree: Hierarchy) -> None:
    _, runs = read_runs(fake_run(tmp_path, tree, [0]))
    config = runs[0].config
    (config.experiment_dir / "evaluation" / "best" / "photos.npz").write_bytes(b"half")
    config.checkpoints_dir.mkdir()
    for name in ("checkpoint_3", "last"):
        (config.checkpoints_dir / f"{name}.pt").touch()
    runner = Recorder(runs, "best", 1, tmp_path)
    runner.run()
    assert [call[0] for call in runner.calls] == ["evaluate.py"]


def test_a_last_checkpoint_older_than_the_kept_one_means_not_trained(tmp_path: Path, tree: Hierarchy) -> None:
    _, runs = read_runs(fake_run(tmp_path, tree, [0]))
    folder = runs[0].config.checkpoints_dir
    folder.mkdir()
    for age, name in ((20, "last"), (10, "checkpoint_3")):
        (folder / f"{name}.pt").touch()
        os.utime(folder / f"{name}.pt", (time.time() - age, time.time() - age))
    assert not runs[0].is_trained


def rescore(run: Run, evaluation: str, **changes) -> None:
    """Moves the scores of `best` to another evaluation, with other values in scores.json."""
    folder = run.config.experiment_dir / "evaluation"
    (folder / "best").rename(folder / evaluation)
    path = folder / evaluation / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def train(run: Run, tree: Hierarchy, best_epoch: int) -> None:
    """The checkpoints of a finished run of three epochs."""
    folder = run.config.checkpoints_dir
    folder.mkdir(exist_ok=True)
    for name, epoch in (("best", best_epoch), ("checkpoint_2", 2), ("checkpoint_3", 3), ("last", 3)):
        state = {"model": {}, "config": run.config.to_dict(), "tree": tree.to_dict(), "epoch": epoch}
        write_whole(pack(state), folder / f"{name}.pt")


def test_scores_of_a_numbered_checkpoint_are_final_once_the_run_is_trained(tmp_path: Path, tree: Hierarchy) -> None:
    _, (run,) = read_runs(fake_run(tmp_path, tree, [0]))
    rescore(run, "checkpoint_2", epoch=2)
    assert run.evaluation("checkpoint_2") is None  # its curves and its time still grow
    train(run, tree, best_epoch=3)
    assert run.evaluation("checkpoint_2") is not None


@pytest.mark.parametrize("has_digest", [True, False])
def test_scores_of_an_earlier_best_checkpoint_are_not_final(tmp_path: Path, tree: Hierarchy, has_digest: bool) -> None:
    _, (run,) = read_runs(fake_run(tmp_path, tree, [0]))
    train(run, tree, best_epoch=1)
    digest = {"checkpoint_sha256": checkpoint_digest(run.config.checkpoints_dir / "best.pt")} if has_digest else {}
    rescore(run, "best", epoch=1, **digest)
    assert run.evaluation("best") is not None
    train(run, tree, best_epoch=2)
    assert run.evaluation("best") is None


def test_scores_of_another_root_bias_are_not_final(tmp_path: Path, tree: Hierarchy) -> None:
    path = fake_run(tmp_path, tree, [0])
    assert read_runs(path)[1][0].evaluation("best") is not None
    content = json.loads(path.read_text())
    content["runs"][0]["overrides"]["root_bias"] = {"body": 0.5}
    path.write_text(json.dumps(content))
    run = read_runs(path)[1][0]
    assert run.evaluation("best") is None
    rescore(run, "best", root_bias={"body": 0.5})
    assert run.evaluation("best") is not None


def test_a_checkpoint_that_no_run_keeps_is_refused(tmp_path: Path) -> None:
    overrides = {"root_dir": str(tmp_path), "n_epochs": 6, "save_epoch": 2, "keep": 2}
    for name in ("checkpoint_2", "checkpoint_5", "checkpoint_8"):
        with pytest.raises(UserError, match=f"{name}', but trial_bce_seed0 ends with checkpoint_4, checkpoint_6"):
            read_runs(write_runs(tmp_path, entry(tmp_path, overrides=overrides), checkpoint=name))
    read_runs(write_runs(tmp_path, entry(tmp_path, overrides=overrides), checkpoint="checkpoint_4"))


HOLD = """
import fcntl, json, os, socket, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": "now"}))
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts processes that hold a lock until they are told to end."""
    processes = []

    def start_holding(path: Path) -> subprocess.Popen:
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", HOLD, str(path)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start_holding
    for process in processes:
        process.communicate()


def test_a_second_runner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold) -> None:
    path = write_runs(tmp_path, entry(tmp_path))
    owner = hold(tmp_path / "experiments" / "logs" / "trial" / ".lock")
    monkeypatch.setattr("sys.argv", ["experiment.py", str(path)])
    with pytest.raises(UserError, match=f"is in use by process {owner.pid}"):
        tool.main()


def test_a_run_that_is_still_trained_by_an_orphan_is_waited_for(tmp_path: Path, hold) -> None:
    _, runs = read_runs(write_runs(tmp_path, entry(tmp_path, seeds=[0])))
    assert not runs[0].is_in_use
    owner = hold(runs[0].config.experiment_dir / ".lock")
    assert runs[0].is_in_use
    owner.communicate()
    assert not runs[0].is_in_use


def test_a_disk_without_locks_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    _, runs = read_runs(write_runs(tmp_path, entry(tmp_path, seeds=[0])))
    runs[0].config.experiment_dir.mkdir(parents=True)
    (runs[0].config.experiment_dir / ".lock").touch()
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert not runs[0].is_in_use


def test_a_signal_while_one_is_passed_on_does_not_block(tmp_path: Path) -> None:
    class Training:
        """Where the first signal arrives, the second follows."""

        received = 0

        def send_signal(self, number: int) -> None:
            self.received += 1
            if self.received == 1:
                runner._on_signal(signal.SIGINT, None)

    runner, training = Runner([], "last", 1, tmp_path), Training()
    runner.processes.add(training)
    handler = threading.Thread(target=runner._on_signal, args=(signal.SIGINT, None), daemon=True)
    handler.start()
    handler.join(5)
    assert not handler.is_alive()
    assert training.received == 2


# ---- results -----------------------------------------------------------------------------------------------------


def test_results_hold_every_run_and_name_the_unfinished(tmp_path: Path, tree: Hierarchy, monkeypatch) -> None:
    path, out = fake_run(tmp_path, tree, [0, 1]), tmp_path / "docs"
    record = json.loads((tmp_path / "experiments/trial_bce_seed0/evaluation/best/scores.json").read_text())
    record["seconds"] = 2.5
    (tmp_path / "experiments/trial_bce_seed0/evaluation/best/scores.json").write_text(json.dumps(record))
    monkeypatch.setattr("sys.argv", ["experiment.py", str(path), "--only-report", "--out", str(out)])
    tool.main()
    results = json.loads((out / "experiments.json").read_text())
    assert results["unfinished"] == ["trial_bce_seed1"]
    (run,) = results["runs"]
    assert run["mIoU1"] == record["scores"]["mIoU1"]
    assert run["per_class"]["level2"] == record["levels"][1]["IoU"]
    assert run["rules"] == record["rules"]
    expected = {"criterion": "bce", "seed": 0, "commit": "abc", "hardware": "a machine", "wall_s": 180.0}
    assert expected.items() <= run.items()
    assert {"decode", "violation_rate", "mIoU3_with_background", "config"} <= set(run)
    assert "Not finished: trial_bce_seed1." in (out / "experiments.md").read_text()


def test_nothing_finished_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_runs(tmp_path, entry(tmp_path))
    monkeypatch.setattr("sys.argv", ["experiment.py", str(path), "--only-report", "--out", str(tmp_path / "docs")])
    with pytest.raises(UserError, match="no run is finished"):
        tool.main()
    assert not (tmp_path / "docs").exists()


# ---- real runs ---------------------------------------------------------------------------------------------------


def start(path: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "tools" / "experiment.py"), str(path), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def epochs(root: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in root.glob("experiments/*/metrics.jsonl"))


def test_a_runner_that_is_stopped_and_killed_goes_on(tmp_path: Path) -> None:
    make_data(tmp_path / "data", train=4, val=2)
    cfg = write_config(tmp_path, tmp_path / "data", n_epochs=3)
    path = write_runs(tmp_path, {"name": "tm", "cfg": str(cfg), "seeds": [0]})
    for end, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before, runner = epochs(tmp_path), start(path, tmp_path / "docs")
        while epochs(tmp_path) == before and runner.poll() is None:
            time.sleep(0.05)
        runner.send_signal(end)
        output, _ = runner.communicate(timeout=120)
        assert runner.returncode == status, output
    runner = start(path, tmp_path / "docs")
    output, _ = runner.communicate(timeout=240)
    assert runner.returncode == 0, output
    results = json.loads((tmp_path / "docs" / "experiments.json").read_text())
    assert [(run["seed"], run["epoch"]) for run in results["runs"]] == [(0, 3)]
    assert set(results["runs"][0]["rules"]) == set(DECODE_RULES)
    assert epochs(tmp_path) == 3  # no epoch was counted twice
