"""Equal configs give equal trainings. That loading does not depend on workers is shown in test_data_pipeline.py."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from manage.checkpoint import load_checkpoint
from tests.factory import curves, make_data, records, run, write_config

SAME = {"deterministic": True, "n_epochs": 2, "color_jitter": 0.3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Trains a ResNet-18 anew with some keys changed; returns the folder of the run."""

    def train(**keys) -> Path:
        root = tmp_path_factory.mktemp("run")
        cfg = write_config(root, data, **SAME | keys)
        status, output = run("train.py", "--cfg", cfg, log=root / "log", real=True)
        assert status == 0, output
        return root

    return train


@pytest.fixture(scope="module")
def reference(trained) -> Path:
    return trained(num_workers=0)


def state(root: Path) -> dict:
    return load_checkpoint(root / "experiments/tiny/models_checkpoints/last.pt")


def bits(root: Path) -> dict[str, bytes]:
    """Weights, BatchNorm statistics and momentum."""
    last = state(root)
    momentum = {f"momentum {i}": values["momentum_buffer"] for i, values in last["optimizer"]["state"].items()}
    return {name: tensor.numpy().tobytes() for name, tensor in (last["model"] | momentum).items()}


def losses(root: Path) -> list[tuple[int, float]]:
    """Of every step."""
    return curves(root)["loss"]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_trainings_of_one_config_end_with_the_same_bits(trained, reference, workers):
    again = trained(num_workers=workers)
    assert bits(again) == bits(reference)
    assert losses(again) == losses(reference)
    assert len(losses(again)) == 8
    assert records(again) == records(reference)


def test_another_seed_gives_another_training(trained, reference):
    other = trained(seed=1, num_workers=0)
    one, two = bits(reference), bits(other)
    equal = [name for name in one if one[name] == two[name]]
    assert all(name.endswith("num_batches_tracked") or name.startswith("input_") for name in equal), equal
    assert losses(other) != losses(reference)


def test_a_run_records_seed_commit_and_versions(reference):
    folder = reference / "experiments/tiny"
    copy = json.loads((folder / "configs/tiny.json").read_text())
    assert (copy["seed"], copy["deterministic"]) == (0, True)
    assert state(reference)["config"] == copy
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["torch"] == torch.__version__
    assert {"commit", "command", "host", "hardware", "threads", "python", "torchvision", "numpy", "pillow"} <= set(
        start
    )
    assert all(start.values()), "nothing is left blank"


def slow_steps_and_a_signal_in_the_second(seconds: float) -> None:
    from manage.train_manager import TrainManager

    step = TrainManager.train_step

    def slow(self, group):
        time.sleep(seconds)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, group)

    TrainManager.train_step = slow


def test_the_seconds_before_a_stop_are_counted(data, tmp_path):
    cfg = write_config(tmp_path, data, **SAME)
    slow = (slow_steps_and_a_signal_in_the_second, 0.3)
    status, output = run("train.py", "--cfg", cfg, log=tmp_path / "log", prepare=slow)
    assert status == 128 + signal.SIGTERM, output
    assert state(tmp_path)["seconds"] >= 0.6
