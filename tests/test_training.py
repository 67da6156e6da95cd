"""Equal configs give equal trainings. That loading does not depend on workers is shown in test_data_pipeline.py."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import pytest
import torch
import torchvision

import models.hseg
from configs.config import Config
from manage.checkpoint import load_checkpoint
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from manage.predictor import Predictor
from manage.train_manager import TrainManager
from manage.training_report import what_tells_apart
from tests.factory import TINY, curves, make_data, records, run, write_config
from tests.kill import before_step
from tests.preloaded import SlimEncoder
from utils.errors import UserError

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


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_trainings_of_one_config_end_with_the_same_bits(trained, reference, workers):
    again = trained(num_workers=workers)
    assert bits(again) == bits(reference)
    assert losses(again) == losses(reference)
    assert len(losses(again)) == 8
    assert records(again) == records(reference)


@pytest.mark.slow
def test_another_seed_gives_another_training(trained, reference):
    other = trained(seed=1, num_workers=0)
    one, two = bits(reference), bits(other)
    equal = [name for name in one if one[name] == two[name]]
    assert all(name.endswith("num_batches_tracked") or name.startswith("input_") for name in equal), equal
    assert losses(other) != losses(reference)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_seconds_before_a_stop_are_counted(data, tmp_path):
    cfg = write_config(tmp_path, data, **SAME)
    slow = [(before_step, 0, time.sleep, 0.6), (before_step, 1, signal.raise_signal, signal.SIGTERM)]
    status, output = run("train.py", "--cfg", cfg, log=tmp_path / "log", prepare=slow)
    assert status == 128 + signal.SIGTERM, output
    assert state(tmp_path)["seconds"] >= 0.6


# --- start weights ---
CACHED = "hub/checkpoints/resnet18-f37072fd.pth"  # torch's name for what `pretrained` asks for


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"pretrained": True}, {"encoder_weights": CACHED}, {"init_from": CACHED}])
def test_start_weights_may_go_once_there_is_a_checkpoint(data, tmp_path, monkeypatch, keys):
    start = tmp_path / CACHED
    start.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: fail_with(OSError("no network")))
    whole = torchvision.models.resnet18().state_dict()  # older files lack the counters
    torch.save({key: value for key, value in whole.items() if "num_batches_tracked" not in key}, start)
    places = {
        "root_dir": str(tmp_path),
        "root_data_dir": str(data),
        "n_train_photos": 2,
        "n_val_photos": 1,
        "n_epochs": 1,
    }
    config = Config(**TINY | places | keys)
    if config.init_from:
        TrainManager(Config(**TINY | places | {"exp_name": "first"})).run()
        (tmp_path / "experiments/first/models_checkpoints/last.pt").replace(start)
    assert TrainManager(config).run() == 0
    start.unlink()
    with pytest.raises(UserError, match="resnet18-f37072fd"):  # a new run cannot do without
        TrainManager(dataclasses.replace(config, exp_name="other")).run()
    assert TrainManager(dataclasses.replace(config, n_epochs=2)).run("") == 0
    scored = EvaluationManager(config, EvaluationOptions(checkpoint="last", pictures=False)).run()
    assert scored["epoch"] == 2
    Predictor.load(config.checkpoints_dir / "last.pt", "cpu")


# --- an end that nobody foresaw ---
@pytest.fixture
def manager(data, tmp_path, monkeypatch):
    """A slim training of two epochs with two steps each, in this process."""
    monkeypatch.setattr(models.hseg, "build_encoder", SlimEncoder)
    keys = {"root_dir": str(tmp_path), "root_data_dir": str(data), "n_epochs": 2, "n_train_photos": 4}
    return lambda: TrainManager(Config(**TINY | keys))


def at_step(run: TrainManager, number: int, action) -> None:
    step = run.learner.step
    run.learner.step = lambda *arguments: action() if run.step == number else step(*arguments)


def fail_with(error: Exception) -> None:
    raise error


def test_an_unexpected_end_saves_what_is_whole_and_says_one_line(manager, tmp_path):
    run = manager()
    load = run.loader._batch

    def spoilt(draws, samples):
        return load(draws, samples) if run.step < 3 else fail_with(ValueError("the photos are gone\nand more"))

    run.loader._batch = spoilt
    with pytest.raises(UserError) as caught:
        run.run()
    file = tmp_path / "experiments/tiny/traceback.txt"
    line = (
        f"step 4 (epoch 2): ValueError: the photos are gone (see {file}). All steps before it are saved; go on with: "
    )
    assert str(caught.value).startswith(line)
    assert "in spoilt" in file.read_text()
    assert state(tmp_path)["step"] == 3
    assert manager().run("") == 0
    assert state(tmp_path)["step"] == 4


ALLOCATIONS = {
    "CPU": lambda: torch.empty(1 << 60),
    "GPU": lambda: fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
}


@pytest.mark.parametrize("device", ALLOCATIONS)
def test_out_of_memory_names_the_keys_and_saves_no_half_step(manager, tmp_path, device):
    run = manager()
    at_step(run, 3, ALLOCATIONS[device])
    with pytest.raises(UserError, match=r"^step 4 .*: out of memory at batch_size 2 and crop_size 32; lower batch_"):
        run.run()
    assert state(tmp_path)["step"] == 2, "the checkpoint of the first epoch stands"


def test_a_run_that_finds_background_alone_says_so_with_usual_causes(manager, capsys):
    run = manager()
    run.learner.network.segmentation_head.start_at = lambda _logits: None
    with torch.no_grad():
        run.learner.network.segmentation_head.weight.zero_()
        run.learner.network.segmentation_head.bias.copy_(torch.tensor([20.0] + [-20.0] * 9))
    run.config.lr = 1e-9
    assert run.run() == 0
    output = capsys.readouterr().out
    assert output.count("warning: not one pixel of a part is found, all is background. Usual causes: ") == 2
    assert "epoch 2/2  loss_train " in output
    assert "done, best in epoch 1: mIoU1 0.0 %; all is in" in output


def test_the_table_of_hparams_shows_five_keys_first_and_then_what_differs():
    shown = what_tells_apart(Config(exp_name="mine", lr=0.5, batch_size=4, root_data_dir="elsewhere"))
    assert sorted(shown) == [" criterion", " decode", " encoder", " lr", " seed", "batch_size"]
    assert (shown[" lr"], shown["batch_size"]) == (0.5, 4)
