"""A training that was killed, told to stop, or lost its newest checkpoint ends with the very bits of one left alone."""

import functools
import hashlib
import os
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from manage.checkpoint import load_checkpoint, pack
from tests.factory import Child, curves, records, save_each_step, train, write_config
from tests.kill import before_step, kill_at, kill_half_written, wait_until_there

pytestmark = pytest.mark.slow
KILLS = 10  # in each of two tests
RICH = {"n_epochs": 4, "val_every": 2, "num_workers": 2, "optimizer": "adamw", "ema_decay": 0.9, "accumulate": 2}
RICH |= {"color_jitter": 0.3}
PLAIN = RICH | {"num_workers": 0, "optimizer": "sgd", "ema_decay": 0, "accumulate": 1, "color_jitter": 0}
FOLDER = "experiments/{}/models_checkpoints"


@pytest.fixture(scope="module")
def left_alone(data, tmp_path_factory):
    """Trains with some keys, and nobody disturbs it; returns its folder and how long it took."""

    @functools.cache
    def start(workers: int) -> tuple[Path, float]:
        root = tmp_path_factory.mktemp("untouched")
        Child("train.py", "--help", log=root / "log").wait()  # starts the fork server, so the clock tells of the run
        began = time.monotonic()
        train(root, data, prepare=[(save_each_step,)], **(RICH if workers else PLAIN))
        return root, time.monotonic() - began

    return start


@pytest.fixture
def untouched(left_alone):
    return left_alone(2)[0]


@pytest.fixture
def resume(data, tmp_path):
    """Trains in tmp_path with the keys of the untouched run."""
    return lambda *words, **more: train(tmp_path, data, *words, **RICH | more)


@pytest.fixture
def copied(untouched, tmp_path):
    """The folder of a copy of the untouched run's checkpoints."""
    for name in ("experiments", "tensorboard"):
        shutil.copytree(untouched / name, tmp_path / name)
    return tmp_path / FOLDER.format("tiny")


def digests(root: Path, name: str = "last", experiment: str = "tiny") -> dict[str, str]:
    """One for each thing in a checkpoint (weights, averages, optimiser, random states, ...), clock and places apart."""
    state = load_checkpoint(root / FOLDER.format(experiment) / f"{name}.pt")
    del state["config"]["root_dir"], state["config"]["exp_name"]
    return {key: hashlib.sha256(pack({key: value})).hexdigest() for key, value in state.items()}


def assert_same_run(root, reference):
    """States, losses, scores and curves: nothing lost or doubled."""
    names = {"last", "best", "previous", "checkpoint_3", "checkpoint_4"}
    assert {path.stem for path in (root / FOLDER.format("tiny")).glob("*.pt")} == names, "keep is 2"
    for name in names - {"previous"}:
        assert digests(root, name) == digests(reference, name), name
    assert records(root) == records(reference)
    drawn = curves(root)
    assert drawn == curves(reference)
    assert [step for step, _ in drawn["loss"]] == list(range(1, len(drawn["loss"]) + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_ten_random_moments_it_ends_with_the_same_bits(left_alone, data, tmp_path, workers):
    reference, seconds = left_alone(workers)
    chance, kills, lives, inside_an_epoch = random.Random(0), 0, 0, 0
    while kills < KILLS:  # a run that ends before it has been killed often enough is followed by another
        root = tmp_path / f"run{lives}"
        cfg, status = write_config(root, data, **(RICH if workers else PLAIN)), None
        while status != 0:
            lives += 1
            child = Child("train.py", "--cfg", cfg, "--resume", "auto", log=root / "log", prepare=[(save_each_step,)])
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
WRITING = {  # point -> how it dies there, and its status
    "before the file": ((kill_at, "open", BESIDE, 1), signal.SIGKILL),
    "half written": ((kill_half_written, 100_000), signal.SIGXFSZ),  # a checkpoint has twice as much, all else less
    "before previous": ((kill_at, "os.rename", "*/previous.pt", 2), signal.SIGKILL),
    "between the renames": ((kill_at, "os.rename", "*/.last.pt.*.part", 3), signal.SIGKILL),
    "before sync of the folder": ((kill_at, "open", "*/models_checkpoints", 3), signal.SIGKILL),
}


def test_killed_at_every_point_of_writing_a_checkpoint_it_ends_with_the_same_bits(untouched, resume, tmp_path):
    for kill, number in WRITING.values():
        output = resume("--resume", "auto", status=-number, prepare=[(save_each_step,), kill])
        assert "damaged" not in output
    resume("--resume")
    assert not list((tmp_path / FOLDER.format("tiny")).glob(".*")), "what is half-written goes"
    assert_same_run(tmp_path, untouched)


def test_a_signal_ends_at_the_next_step_and_the_run_goes_on_by_the_command_it_prints(untouched, resume, tmp_path):
    words = []
    for step, number in enumerate([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], 3):
        hear = (signal.signal, number, signal.default_int_handler)  # in the background a shell has SIGINT ignored
        stop = (before_step, step, signal.raise_signal, number)
        output = resume(*words, status=128 + number, prepare=[hear, stop])
        said = re.search(rf"by {number.name} after step {step + 1}; all is saved; go on with: python (.*)", output)
        words = ["--resume"]
    script, *words = shlex.split(said[1])
    child = Child(Path(script).name, *words, log=tmp_path / "log")
    assert child.wait() == 0, child.output
    assert digests(tmp_path)["model"] == digests(untouched)["model"]
    assert records(tmp_path) == records(untouched)


def test_nohup_is_respected_and_a_second_signal_ends_at_once(resume, data, tmp_path):
    nohup = (signal.signal, signal.SIGHUP, signal.SIG_IGN)
    resume(prepare=[nohup, (before_step, 1, signal.raise_signal, signal.SIGHUP)], n_epochs=1)
    cfg, prepare = write_config(tmp_path, data, exp_name="second"), [(before_step, 1, wait_until_there, "/no/place")]
    child = Child("train.py", "--cfg", cfg, log=tmp_path / "log", prepare=prepare)
    child.wait_for("waiting")
    for _ in range(2):
        assert child.process.is_alive(), "the first waits for the step to end"
        os.kill(child.process.pid, signal.SIGTERM)
        time.sleep(0.3)
    assert child.wait(60) == -signal.SIGTERM


def test_damaged_checkpoints_are_named_and_push_no_whole_one_out(untouched, resume, copied, tmp_path):
    for path in copied.glob("*.pt"):
        if load_checkpoint(path)["epoch"] == 4 and path.stem != "previous":  # all that was written at the end
            path.write_bytes(path.read_bytes()[:-1])
    kill = (kill_at, "os.rename", "*/.last.pt.*.part", 1)
    output = resume("--resume", status=-signal.SIGKILL, prepare=[kill])
    assert f"{copied / 'last.pt'}: truncated, damaged" in output
    assert "previous.pt at epoch 4" in output
    resume("--resume")
    assert_same_run(tmp_path, untouched)


def test_an_older_checkpoint_is_gone_on_from_under_a_new_name_alone(untouched, resume, copied, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "experiments").rglob("*.*") if path.is_file()}
    assert "start another: exp_name=NEW_NAME" in resume("--resume", "checkpoint_3", status=2)
    words, kill = ["exp_name=second", "--resume"], (kill_at, "os.rename", "*/.last.pt.*.part", 2)
    resume(*words, copied / "checkpoint_3.pt", status=-signal.SIGKILL, prepare=[kill])
    resume(*words)
    assert digests(tmp_path, "last", "second") == digests(untouched)
    assert records(tmp_path, "second") == records(untouched)[3:]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("keys", [{"amp": "fp16"}, {"n_train_photos": 4, "keep": 1}], ids=["fp16", "resnet"])
def test_the_scale_of_fp16_and_a_resnet_are_resumed_to_the_same_bits(data, tmp_path, keys):
    whole, parted, keys = tmp_path / "whole", tmp_path / "parted", keys | {"n_epochs": 1, "n_val_photos": 1}
    keys["real"] = "amp" not in keys
    train(whole, data, **keys)
    train(parted, data, status=9, prepare=[(save_each_step,), (before_step, 1, os._exit, 9)], **keys)
    output = train(parted, data, "--resume", **keys)
    assert "at epoch 1, batch 2" in output
    assert digests(parted) == digests(whole)
