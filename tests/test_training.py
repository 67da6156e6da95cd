"""Equal configs give equal trainings; start weights; ends that nobody foresaw; what is said and recorded."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torchvision

from configs.config import Config
from manage.checkpoint import load_checkpoint
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from manage.predictor import Predictor
from manage.train_manager import TrainManager
from tests.factory import TINY, curves, records, train
from utils.errors import UserError


def state(root: Path, name: str = "tiny") -> dict:
    return load_checkpoint(root / "experiments" / name / "models_checkpoints/last.pt")


@pytest.mark.slow
def test_trainings_of_one_config_end_with_the_same_bits_and_those_of_another_seed_do_not(data, tmp_path):
    found = []
    for name, keys in {"a": {"seed": 0}, "b": {"seed": 0, "num_workers": 2}, "c": {"seed": 1}}.items():
        train(tmp_path, data, exp_name=name, deterministic=True, n_epochs=2, color_jitter=0.3, **keys)
        last = state(tmp_path, name)
        momentum = {i: values["momentum_buffer"] for i, values in last["optimizer"]["state"].items()}
        bits = {key: tensor.numpy().tobytes() for key, tensor in (last["model"] | momentum).items()}
        found.append((bits, curves(tmp_path, name)["loss"], records(tmp_path, name)))
    one, again, other = found
    assert one == again
    assert len(one[1]) == 8, "the loss of every step"
    equal = [key for key in one[0] if one[0][key] == other[0][key]]
    assert all(str(key).endswith("num_batches_tracked") or str(key).startswith("input_") for key in equal), equal
    (start,) = json.loads((tmp_path / "experiments" / name / "environment.json").read_text())
    assert {"commit", "command", "host", "hardware", "threads", "python", "torchvision", "numpy", "pillow"} < {*start}
    assert all(start.values()), "nothing is left blank"


# --- start weights ---
CACHED = "hub/checkpoints/resnet18-f37072fd.pth"  # torch's name for what `pretrained` asks for


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"pretrained": True}, {"encoder_weights": CACHED}, {"init_from": CACHED}], ids=str)
def test_start_weights_may_go_once_there_is_a_checkpoint(data, tmp_path, monkeypatch, keys):
    start = tmp_path / CACHED
    start.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: fail_with(OSError("no network")))
    whole = torchvision.models.resnet18().state_dict()  # older files lack the counters
    torch.save({key: value for key, value in whole.items() if "num_batches_tracked" not in key}, start)
    places = {"root_dir": str(tmp_path), "root_data_dir": str(data), "n_train_photos": 2, "n_val_photos": 1}
    config = Config(**TINY | places | {"n_epochs": 1} | keys)
    if config.init_from:
        TrainManager(dataclasses.replace(config, init_from=None, exp_name="first")).run()
        (tmp_path / "experiments/first/models_checkpoints/last.pt").replace(start)
    assert TrainManager(config).run() == 0
    start.unlink()
    with pytest.raises(UserError, match="resnet18-f37072fd") as refusal:  # a new run cannot do without
        TrainManager(dataclasses.replace(config, exp_name="other")).run()
    assert not config.pretrained or "no network). Fetch that file on another machine" in str(refusal.value)
    assert TrainManager(dataclasses.replace(config, n_epochs=2)).run("") == 0
    assert EvaluationManager(config, EvaluationOptions(checkpoint="last", pictures=False)).run()["epoch"] == 2
    Predictor.load(config.checkpoints_dir / "last.pt", "cpu")


# --- an end that nobody foresaw ---
@pytest.fixture
def manager(slim, data, tmp_path):
    """A slim training of two epochs with two steps each, in this process."""
    keys = {"root_dir": str(tmp_path), "root_data_dir": str(data), "n_epochs": 2, "n_train_photos": 4}
    return lambda: TrainManager(Config(**TINY | keys))


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
    said = f"step 4 (epoch 2): ValueError: the photos are gone (see {file}). All steps before it are saved; go on"
    assert str(caught.value).startswith(said)
    assert "in spoilt" in file.read_text()
    assert state(tmp_path)["step"] == 3
    assert manager().run("") == 0
    assert state(tmp_path)["step"] == 4


def test_an_epoch_that_could_not_be_told_of_is_still_the_best_when_it_is_the_best(manager, tmp_path):
    run = manager()
    run._is_best, run.report.epoch = lambda score: True, lambda *_: fail_with(BrokenPipeError(32, "Broken pipe"))
    with pytest.raises(UserError, match="Broken pipe"):
        run.run()
    assert state(tmp_path)["best"] is None
    assert manager().run("") == 0
    assert (tmp_path / "experiments/tiny/models_checkpoints/best.pt").is_file()


def test_out_of_memory_names_the_keys_and_saves_no_half_step(manager, tmp_path):
    for error in (lambda: torch.empty(1 << 60), lambda: fail_with(torch.OutOfMemoryError("CUDA out of memory."))):
        run = manager()
        step = run.learner.step
        run.learner.step = lambda *args, run=run, step=step, error=error: error() if run.step == 3 else step(*args)
        with pytest.raises(UserError, match=r"^step 4 .*: out of memory at batch_size 2 and crop_size 32; lower bat"):
            run.run(overwrite=True)
        assert state(tmp_path)["step"] == 2, "the checkpoint of the first epoch stands"


def test_a_run_that_finds_background_alone_says_so_with_usual_causes(manager, capsys):
    run = manager()
    head = run.learner.network.segmentation_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([20.0] + [-20.0] * 9))
    run.config.lr = 1e-9
    assert run.run() == 0
    output = capsys.readouterr().out
    assert output.count("warning: not one pixel of a part is found, all is background. Usual causes: ") == 2
    assert "done, best in epoch 1: mIoU1 0.0 %; all is in" in output
