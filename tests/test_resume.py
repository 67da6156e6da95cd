"""A training that was killed, told to stop, or lost its newest checkpoint ends with the very bits of one left alone."""

import os
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from manage.checkpoint import load_checkpoint
from tests.factory import Child, curves, make_data, records, run, save_each_step, write_config
from tests.kill import before_step, kill_at, kill_half_written, wait_until_there

pytestmark = pytest.mark.slow
KILLS = 20
PLAIN = {"num_workers": 0, "optimizer": "sgd"}
RICH = {"num_workers": 2, "optimizer": "adamw", "lr": 0.003, "ema_decay": 0.9, "color_jitter": 0.3, "accumulate": 2}
TIMED = ("train/photos_per_second", "train/memory_GiB")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("resume") / "data")


@pytest.fixture(scope="module", params=[PLAIN, RICH], ids=["0 workers", "2 workers"])
def untouched(request, data, tmp_path_factory):
    """A run that nobody disturbs: its folder, its keys and how long it took."""
    root = tmp_path_factory.mktemp("untouched")
    keys = {"n_epochs": 4, "val_every": 2} | request.param
    cfg = write_config(root, data, **keys)
    Child("train.py", "--help", log=root / "log").wait()  # the fork server has started, so the clock tells of the run
    began = time.monotonic()
    status, output = run("train.py", "--cfg", cfg, log=root / "log", prepare=(save_each_step,))
    assert status == 0, output
    return root, keys, time.monotonic() - began


@pytest.fixture
def resume(untouched, data, tmp_path):
    """Trains in tmp_path with the keys of the untouched run; returns exit status and output."""

    def train(*arguments, prepare=()):
        cfg = write_config(tmp_path, data, **untouched[1])
        return run("train.py", "--cfg", cfg, *arguments, log=tmp_path / "log", prepare=prepare)

    return train


@pytest.fixture
def copied(untouched, tmp_path):
    """The folder of a copy of the untouched run's checkpoints."""
    for name in ("experiments", "tensorboard"):
        shutil.copytree(untouched[0] / name, tmp_path / name)
    return tmp_path / "experiments/tiny/models_checkpoints"


def checkpoint(root, name, experiment="tiny"):
    return load_checkpoint(root / "experiments" / experiment / "models_checkpoints" / f"{name}.pt")


def assert_same(one, other, where="state"):
    """Equal to the last bit, whatever is nested in what."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_run(root, reference):
    """Weights, averages, optimiser, random states, best score, losses, metrics and curves: nothing lost or doubled."""
    names = {"last", "best", "previous", "checkpoint_3", "checkpoint_4"}
    assert {path.stem for path in (root / "experiments/tiny/models_checkpoints").glob("*.pt")} == names, "keep is 2"
    for name in names - {"previous"}:
        one, other = checkpoint(root, name), checkpoint(reference, name)
        for state in (one, other):
            del state["seconds"], state["config"]["root_dir"]
        assert_same(one, other, name)
    assert records(root) == records(reference)
    one, other = ({tag: v for tag, v in curves(r).items() if tag not in TIMED} for r in (root, reference))
    assert one == other
    assert [step for step, _ in one["loss"]] == list(range(1, len(one["loss"]) + 1))


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(untouched, data, tmp_path):
    reference, keys, seconds = untouched
    chance, kills, lives, inside_an_epoch = random.Random(0), 0, 0, 0
    while kills < KILLS:  # a run that ends before it has been killed often enough is followed by another
        root = tmp_path / f"run{lives}"
        cfg = write_config(root, data, **keys)
        status = None
        while status != 0:
            lives += 1
            arguments = ["--resume"] if (root / "experiments/tiny/configs/tiny.json").exists() else []
            child = Child("train.py", "--cfg", cfg, *arguments, log=root / "log", prepare=(save_each_step,))
            if kills < KILLS:
                child.process.join(chance.uniform(0, 0.6 * seconds))
                child.process.kill()
            status = child.wait()
            kills += status == -signal.SIGKILL
            inside_an_epoch += "resumed" in child.output and "batch 1\n" not in child.output
            assert status in (0, -signal.SIGKILL), child.output
        assert_same_run(root, reference)
    assert inside_an_epoch > 0


BESIDE = "*/.*.pt.*.part"  # what a checkpoint is written to before it gets its name
WRITING = {
    "before the file": (kill_at, "open", BESIDE, 1),
    "half written": (kill_half_written, 100_000),  # a checkpoint has twice as much, all else less
    "before previous": (kill_at, "os.rename", "*/previous.pt", 2),
    "between the renames": (kill_at, "os.rename", "*/.last.pt.*.part", 3),
    "before sync of the folder": (kill_at, "open", "*/models_checkpoints", 3),
}


def test_killed_at_every_point_of_writing_a_checkpoint_it_ends_with_the_same_bits(untouched, resume, tmp_path):
    for number, (point, kill) in enumerate(WRITING.items()):
        status, output = resume(*["--resume"] * bool(number), prepare=[(save_each_step,), kill])
        assert status in (-signal.SIGKILL, -signal.SIGXFSZ), f"{point}: {output}"
        assert "damaged" not in output
    status, output = resume("--resume")
    assert status == 0, output
    assert not list((tmp_path / "experiments/tiny/models_checkpoints").glob(".*")), "what is half-written goes"
    assert_same_run(tmp_path, untouched[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_at_the_next_step_and_the_run_goes_on_by_the_command_it_prints(
    untouched, resume, tmp_path, number
):
    status, output = resume(prepare=(before_step, 5, signal.raise_signal, number))
    assert status == 128 + number, output
    command = re.search(rf"stopped by {number.name} after step 6; all is saved. Go on with: python (.*)", output)[1]
    script, *words = shlex.split(command)
    status, output = run(Path(script).name, *words, log=tmp_path / "log")
    assert status == 0, output
    for state in ("best", "last"):
        assert_same(checkpoint(tmp_path, state)["model"], checkpoint(untouched[0], state)["model"])
    assert records(tmp_path) == records(untouched[0])


def test_nohup_is_respected(resume):
    nohup = (signal.signal, signal.SIGHUP, signal.SIG_IGN)
    status, output = resume(prepare=[nohup, (before_step, 1, signal.raise_signal, signal.SIGHUP)])
    assert status == 0, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(data, tmp_path, number):
    prepare = (before_step, 1, wait_until_there, "/no/such/place")
    child = Child("train.py", "--cfg", write_config(tmp_path, data), log=tmp_path / "log", prepare=prepare)
    child.wait_for("waiting")
    os.kill(child.process.pid, number)
    time.sleep(0.5)
    assert child.process.is_alive(), "the first waits for the step to end"
    os.kill(child.process.pid, number)
    assert child.wait(60) == -number


def hear_of_the_signal_from_another_process_first() -> None:
    """torchrun tells one process after the other: this one's own signal comes while it saves already."""
    from manage import distributed
    from manage.train_manager import TrainManager

    save = TrainManager.save

    def told_late(self, *names):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, *names)

    TrainManager.save = told_late
    distributed.largest = lambda value: 2 * signal.SIGTERM if value != 1 else value


def test_a_signal_that_another_process_had_first_is_no_second_one(data, tmp_path):
    status, output = run(
        "train.py",
        "--cfg",
        write_config(tmp_path, data),
        log=tmp_path / "log",
        prepare=(hear_of_the_signal_from_another_process_first,),
    )
    assert status == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step 1; all is saved" in output
    assert checkpoint(tmp_path, "last")["step"] == 1


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(untouched, resume, copied, tmp_path):
    last = copied / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    status, output = resume("--resume")
    assert status == 0, output
    assert f"{last}: truncated, damaged" in output
    assert_same_run(tmp_path, untouched[0])


def test_two_damaged_checkpoints_push_no_whole_one_out(untouched, resume, copied, tmp_path):
    for name in ("best", "checkpoint_4", "last"):  # all that was written at the end
        path = copied / f"{name}.pt"
        if load_checkpoint(path)["epoch"] == 4:  # the best may be older
            path.write_bytes(path.read_bytes()[:-1])
    status, output = resume("--resume", prepare=(kill_at, "os.rename", "*/.last.pt.*.part", 1))
    assert status == -signal.SIGKILL, output
    assert "previous.pt at epoch 4" in output
    status, output = resume("--resume")
    assert status == 0, output
    assert_same_run(tmp_path, untouched[0])


def test_an_older_checkpoint_is_gone_on_from_under_a_new_name_alone(untouched, resume, copied, tmp_path):
    reference = untouched[0]
    before = {path: path.read_bytes() for path in (tmp_path / "experiments").rglob("*.*") if path.is_file()}
    status, output = resume("--resume", "checkpoint_3")
    assert status == 2, output
    file = copied / "checkpoint_3.pt"
    assert "checkpoint_3.pt is older than last.pt, and a run goes on from its newest checkpoint only" in output
    command = f"exp_name=NEW --resume {file}"
    assert output.strip().endswith(command), output
    words = command.replace("NEW", "second").split()
    kill = (kill_at, "os.rename", "*second/models_checkpoints/.last.pt.*.part", 2)
    assert resume(*words, prepare=kill)[0] == -signal.SIGKILL
    status, output = resume("exp_name=second", "--resume")
    assert status == 0, output
    assert_same(checkpoint(tmp_path, "last", "second")["model"], checkpoint(reference, "last")["model"])
    assert records(tmp_path, "second") == records(reference)[3:]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("keys", "is_real"), [({"amp": "fp16"}, False), ({"n_train_photos": 4, "keep": 1}, True)])
def test_the_scale_of_fp16_and_a_resnet_are_resumed_to_the_same_bits(data, tmp_path, keys, is_real):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    runs = [(whole, [], 0), (parted, [(save_each_step,), (before_step, 1, os._exit, 9)], 9), (parted, [], 0)]
    for number, (root, prepare, expected) in enumerate(runs):
        cfg = write_config(root, data, **keys | {"n_epochs": 2, "val_every": 2, "n_val_photos": 1})
        words = ["--resume"] * (number == 2)
        status, output = run("train.py", "--cfg", cfg, *words, log=root / "log", real=is_real, prepare=prepare)
        assert status == expected, output
    assert "resumed from" in output
    assert "epoch 1, batch 2" in output
    one, other = checkpoint(parted, "last"), checkpoint(whole, "last")
    for key in ("model", "optimizer", "scaler"):
        assert_same(one[key], other[key])
    assert records(parted) == records(whole)
    assert is_real or one["scaler"]["_growth_tracker"] > 0
