"""A training that was killed, told to stop, or lost its newest checkpoint ends with the very bits of one left alone."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from manage.checkpoint import load_checkpoint
from tests.factory import Child, curves, make_data, records, run, save_each_step, write_config
from tests.kill import kill_at, kill_half_written

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
    began = time.monotonic()
    cfg = write_config(root, data, **keys)
    status, output = run("train.py", "--cfg", cfg, log=root / "log", prepare=(save_each_step,))
    assert status == 0, output
    return root, keys, time.monotonic() - began


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
    for name in ("last", "best", "checkpoint_3", "checkpoint_4"):
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


def test_killed_at_every_point_of_writing_a_checkpoint_it_ends_with_the_same_bits(untouched, data, tmp_path):
    reference, keys, _ = untouched
    cfg = write_config(tmp_path, data, **keys)
    arguments, folder = [], tmp_path / "experiments/tiny/models_checkpoints"
    for point, kill in WRITING.items():
        prepare = [(save_each_step,), kill]
        status, output = run("train.py", "--cfg", cfg, *arguments, log=tmp_path / "log", prepare=prepare)
        assert status in (-signal.SIGKILL, -signal.SIGXFSZ), f"{point}: {output}"
        assert "damaged" not in output
        arguments = ["--resume"]
    status, output = run("train.py", "--cfg", cfg, "--resume", log=tmp_path / "log")
    assert status == 0, output
    assert not list(folder.glob(".*")), "half-written files are cleared away"
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_at_the_next_step_and_the_run_goes_on_from_there(untouched, data, tmp_path, number):
    reference, keys, _ = untouched
    cfg = write_config(tmp_path, data, **keys)
    child = Child("train.py", "--cfg", cfg, log=tmp_path / "log")
    child.wait_for("mIoU1")  # after the second epoch
    os.kill(child.process.pid, number)
    assert child.wait() == 128 + number, child.output
    assert f"stopped by {number.name}" in child.output
    assert "--resume" in child.output
    status, output = run("train.py", "--cfg", cfg, "--resume", log=tmp_path / "log")
    assert status == 0, output
    for state in ("best", "last"):
        assert_same(checkpoint(tmp_path, state)["model"], checkpoint(reference, state)["model"])
    assert records(tmp_path) == records(reference)


def sleep_in_the_second_step() -> None:
    from manage.train_manager import TrainManager

    step = TrainManager.train_step

    def slow(self, group):
        if self.step == 1:
            print("asleep", flush=True)
            while True:
                time.sleep(0.05)
        return step(self, group)

    TrainManager.train_step = slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(data, tmp_path, number):
    child = Child(
        "train.py", "--cfg", write_config(tmp_path, data), log=tmp_path / "log", prepare=(sleep_in_the_second_step,)
    )
    child.wait_for("asleep")
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


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(untouched, data, tmp_path):
    reference, keys, _ = untouched
    for name in ("experiments", "tensorboard"):
        shutil.copytree(reference / name, tmp_path / name)
    last = tmp_path / "experiments/tiny/models_checkpoints/last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    cfg = write_config(tmp_path, data, **keys)
    status, output = run("train.py", "--cfg", cfg, "--resume", log=tmp_path / "log")
    assert status == 0, output
    assert f"{last}: truncated, damaged" in output
    assert_same_run(tmp_path, reference)


def test_two_damaged_checkpoints_push_no_whole_one_out(untouched, data, tmp_path):
    reference, keys, _ = untouched
    for name in ("experiments", "tensorboard"):
        shutil.copytree(reference / name, tmp_path / name)
    for name in ("best", "checkpoint_4", "last"):  # all that was written at the end
        path = tmp_path / "experiments/tiny/models_checkpoints" / f"{name}.pt"
        if load_checkpoint(path)["epoch"] == 4:  # the best may be older
            path.write_bytes(path.read_bytes()[:-1])
    cfg = write_config(tmp_path, data, **keys)
    status, output = run(
        "train.py",
        "--cfg",
        cfg,
        "--resume",
        log=tmp_path / "log",
        prepare=(kill_at, "os.rename", "*/.last.pt.*.part", 1),
    )
    assert status == -signal.SIGKILL, output
    assert "previous.pt at epoch 4" in output
    status, output = run("train.py", "--cfg", cfg, "--resume", log=tmp_path / "log")
    assert status == 0, output
    assert_same_run(tmp_path, reference)


def test_an_older_checkpoint_is_gone_on_from_under_a_new_name_alone(untouched, data, tmp_path):
    reference, keys, _ = untouched
    for name in ("experiments", "tensorboard"):
        shutil.copytree(reference / name, tmp_path / name)
    before = {path: path.read_bytes() for path in (tmp_path / "experiments").rglob("*.*") if path.is_file()}
    cfg, log = write_config(tmp_path, data, **keys), tmp_path / "log"
    status, output = run("train.py", "--cfg", cfg, "--resume", "checkpoint_3", log=log)
    assert status == 2, output
    file = tmp_path / "experiments/tiny/models_checkpoints/checkpoint_3.pt"
    command = f"exp_name=NEW --resume {file}"
    assert "checkpoint_3.pt is older than last.pt, and a run goes on from its newest checkpoint only. Go on from there "
    assert output.strip().endswith(command), output
    words = command.replace("NEW", "second").split()
    kill = (kill_at, "os.rename", "*second/models_checkpoints/.last.pt.*.part", 2)
    assert run("train.py", "--cfg", cfg, *words, log=log, prepare=kill)[0] == -signal.SIGKILL
    status, output = run("train.py", "--cfg", cfg, "exp_name=second", "--resume", log=log)
    assert status == 0, output
    assert_same(checkpoint(tmp_path, "last", "second")["model"], checkpoint(reference, "last")["model"])
    assert records(tmp_path, "second") == records(reference)[3:]
    assert {path: path.read_bytes() for path in before} == before


def test_the_scale_of_half_precision_is_resumed(data, tmp_path):
    keys = {"amp": "fp16", "n_epochs": 2, "val_every": 2}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    status, output = run("train.py", "--cfg", write_config(whole, data, **keys), log=whole / "log")
    assert status == 0, output
    cfg = write_config(parted, data, **keys)
    child = Child("train.py", "--cfg", cfg, log=parted / "log")
    child.wait_for("loss_train")
    os.kill(child.process.pid, signal.SIGTERM)
    child.wait()
    assert run("train.py", "--cfg", cfg, "--resume", log=parted / "log")[0] == 0
    assert checkpoint(whole, "last")["scaler"]["_growth_tracker"] > 0
    assert_same(checkpoint(parted, "last")["scaler"], checkpoint(whole, "last")["scaler"])
    assert_same(checkpoint(parted, "last")["model"], checkpoint(whole, "last")["model"])


def test_a_resnet_too_ends_with_the_same_bits(data, tmp_path):
    keys = {"n_epochs": 2, "n_train_photos": 4, "n_val_photos": 1, "keep": 1}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    status, output = run("train.py", "--cfg", write_config(whole, data, **keys), log=whole / "log", real=True)
    assert status == 0, output
    cfg = write_config(parted, data, **keys)
    child = Child("train.py", "--cfg", cfg, log=parted / "log", real=True, prepare=(save_each_step,))
    child.wait_for("loss_train")
    child.process.kill()
    child.wait()
    assert run("train.py", "--cfg", cfg, "--resume", log=parted / "log", real=True)[0] == 0
    assert_same(checkpoint(parted, "last")["model"], checkpoint(whole, "last")["model"])
    assert_same(checkpoint(parted, "last")["optimizer"], checkpoint(whole, "last")["optimizer"])
    assert records(parted) == records(whole)
