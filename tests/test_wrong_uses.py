"""A user's mistakes: each ends in one message that says what is wrong and where, before any work is done."""

import json
import os
import shutil
import socket

import pytest
import torch
from PIL import Image

from configs.config import Config
from manage.checkpoint import load_checkpoint, pack
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from manage.inference import forward
from manage.train_manager import TrainManager
from tests.factory import TINY, TREE, make_data
from utils.errors import UserError
from utils.files import write_whole
from utils.locks import Lock

# none of these mistakes is the encoder's, so a small one stands in for the ResNet
pytestmark = pytest.mark.usefixtures("slim")


@pytest.fixture
def keys(tmp_path):
    """The values of a config that works, with a data set of its own to spoil."""
    make_data(tmp_path / "data", train=4, val=2)
    return TINY | {"n_epochs": 1, "root_dir": str(tmp_path), "root_data_dir": "data"}


@pytest.fixture
def trained(keys):
    """The same after one epoch of training."""
    assert train(keys)() == 0
    return keys


def refused(action, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    for part in parts:
        assert part in str(caught.value)


def train(keys, resume=None, overwrite=False, take_over=False, **changes):
    return lambda: TrainManager(Config(**(keys | changes))).run(resume, overwrite, take_over)


def evaluate(keys, checkpoint=None, **changes):
    return lambda: EvaluationManager(Config(**(keys | changes)), EvaluationOptions(checkpoint=checkpoint))


def photo(root):
    return root / "data/JPEGImages/p01.jpg"


def write_ids(text: str):
    return lambda root: (root / "data/train_id.txt").write_text(text)


def add_stale(root):
    """A photo with a label map that the encoder did not write."""
    for name in ("JPEGImages/{}.jpg", "gt_masks_hie/{}.png"):
        shutil.copy(root / "data" / name.format("p00"), root / "data" / name.format("stale"))
    write_ids("p00\nstale\n")(root)


def write_file(place: str):
    return lambda root: ((root / place).parent.mkdir(exist_ok=True), (root / place).write_text("mine"))


REFUSED = {  # what is spoilt, keys of the config, and what must be said
    "no data": (None, {"root_data_dir": "nowhere"}, ["root_data_dir", "nowhere", "make_sample_data"]),
    "number of classes": (None, {"n_classes": 7}, ["n_classes", "7", "10 nodes"]),
    "one pixel": (None, {"batch_size": 1, "crop_size": 32}, ["'batch_size' 1 and 'crop_size' 32", "BatchNorm"]),
    "no photo": (lambda root: photo(root).unlink(), {}, ["'p01'", "JPEGImages"]),
    "not encoded": (lambda root: shutil.rmtree(root / "data/gt_masks_hie"), {}, ["gt_masks_hie", "dataset_hie_enc"]),
    "another size": (lambda root: Image.new("RGB", (90, 40)).save(photo(root)), {}, ["p01"]),
    "damaged photo": (lambda root: photo(root).write_bytes(b"no photo"), {}, ["p01", "repair or remove"]),
    "no id": (write_ids(""), {}, ["train_id.txt", "empty"]),
    "id twice": (write_ids("p00\np00\n"), {}, ["train_id.txt", "line 2"]),
    "stale label map": (add_stale, {}, ["train_id.txt: 1 of 2", "first: stale", "gt_masks_hie", "dataset_hie_enc"]),
    "id in both lists": (write_ids("p04\np00\n"), {}, ["train_id.txt", "both"]),
    "a file as experiment": (write_file("experiments/tiny"), {}, ["experiments/tiny: cannot be written (File exists)"]),
    "a file as curves": (write_file("tensorboard"), {}, ["tensorboard/tiny: cannot be written (Not a directory)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_by_name_before_any_work(keys, tmp_path, case):
    spoil, changes, parts = REFUSED[case]
    if spoil:
        spoil(tmp_path)
    refused(train(keys, **changes), *parts)


CUT = {
    "batch_size 50 is more than this run has room for; 4 is used": {"batch_size": 50},
    "warmup_epochs 1 is more than this run has room for; 0.5 is used": {"warmup_epochs": 1.0},
    "val_every 5 is more than this run has room for; 1 is used": {"val_every": 5, "save_epoch": 1},
    "1 epochs of 4 steps": {"batch_size": 1, "freeze_batchnorm": True},
}


@pytest.mark.parametrize("said", CUT)
def test_a_value_that_is_too_large_is_cut_and_said(keys, capsys, said):
    assert train(keys, **CUT[said])() == 0
    assert said in capsys.readouterr().out


def test_an_experiment_is_never_overwritten(trained, tmp_path):
    before = (tmp_path / "experiments/tiny/models_checkpoints/last.pt").read_bytes()
    refused(train(trained, lr=0.5), "tiny", "--resume", "--overwrite")
    refused(train(trained, "", lr=0.5), "lr")
    assert (tmp_path / "experiments/tiny/models_checkpoints/last.pt").read_bytes() == before
    assert train(trained, overwrite=True, lr=0.5)() == 0
    (aside,) = (tmp_path / "experiments").glob("tiny.old-*")
    assert (aside / "models_checkpoints/last.pt").read_bytes() == before


def test_a_second_process_is_refused_a_stale_lock_taken_over_and_one_of_another_host_when_told(keys, tmp_path, capsys):
    other = Lock(tmp_path / "experiments/tiny")
    other.folder.mkdir(parents=True)
    other.take()
    refused(train(keys), f"in use by process {os.getpid()} on {socket.gethostname()} since 2", "choose another")
    other.lock.release()  # as the kernel does for a process that was killed
    assert train(keys)() == 0
    assert f"the lock of process {os.getpid()} on" in capsys.readouterr().out
    other.signature.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "noon"}))
    refused(train(keys, ""), "was locked by process 1 on elsewhere since noon", "--take-over", "both would write")
    assert train(keys, "", take_over=True)() == 0
    assert "the lock of process 1 on elsewhere since noon is taken over" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_photos_or_a_changed_tree(keys, tmp_path):
    path, tree = tmp_path / "tree.json", json.loads(TREE.read_text())
    path.write_text(json.dumps(tree))
    keys["hierarchy"] = str(path)
    assert train(keys)() == 0
    ids = {split: (tmp_path / "data" / f"{split}_id.txt").read_text().split() for split in ("train", "val")}
    for split, names in ids.items():
        (tmp_path / "data" / f"{split}_id.txt").write_text("\n".join(names[::-1]) + "\n")
        refused(train(keys, ""), f"{split}_id.txt", "other photos", "last.pt", "put the old ones back")
        (tmp_path / "data" / f"{split}_id.txt").write_text("\r\n".join(names))
    record = tmp_path / "data/gt_masks_hie/encoding.json"
    record.write_text((before := record.read_text()).replace('"counts": {', '"counts": {"9": 7, ', 1))
    refused(train(keys, ""), "other labels in", "gt_masks_hie", "last.pt")
    record.write_text(before)
    tree["nodes"][1]["colour"] = [1, 2, 3]
    path.write_text(json.dumps(tree))
    assert train(keys, "")() == 0
    tree["levels"][2] = "whole"
    path.write_text(json.dumps(tree))
    refused(train(keys, ""), f"the tree {path} has other levels", "last.pt")
    tree["nodes"][1]["name"] = "forearm"
    folder = tmp_path / "experiments/tiny/models_checkpoints"
    write_whole(pack(load_checkpoint(folder / "last.pt") | {"tree": tree}), folder / "tree.pt")
    refused(evaluate(keys, "tree"), "encoding.json", "tree")


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(keys, tmp_path):
    manager = TrainManager(Config(**keys | {"n_epochs": 2}))
    step = manager.train_step
    manager.train_step = lambda group: step([b._replace(image=b.image / (manager.step != 3)) for b in group])
    refused(manager.run, "step 4 (epoch 2): loss nan", "not finite", "Photos: p0", "from before it", "grad_clip")
    last = load_checkpoint(tmp_path / "experiments/tiny/models_checkpoints/last.pt")
    assert (last["step"], last["epoch"]) == (2, 1)
    assert all(tensor.isfinite().all() for tensor in last["model"].values())
    manager = TrainManager(Config(**keys | {"n_epochs": 3}))
    manager._validate = lambda: forward(lambda photos: photos / 0, torch.ones(1, 3, 32, 32), "off")
    refused(lambda: manager.run(""), "logits are not finite", "from before it", "grad_clip")
    assert load_checkpoint(tmp_path / "experiments/tiny/models_checkpoints/last.pt")["step"] == 2


def test_a_finished_run_goes_on_with_more_epochs(trained, tmp_path, capsys):
    folder = tmp_path / "experiments/tiny"
    (folder / "models_checkpoints/best.pt").unlink()  # then it is no longer the one to beat
    refused(train(trained, n_epochs=3), "exists already", "--resume")
    assert train(trained, "", n_epochs=3)() == 0
    output = capsys.readouterr().out
    (folder / "metrics.jsonl").write_text("[]\n")
    refused(train(trained, "", n_epochs=3), "metrics.jsonl: a line is no record")
    assert "resumed from" in output
    assert "epoch 3/3" in output
    assert json.loads((folder / "configs/tiny.json").read_text())["n_epochs"] == 3
    assert load_checkpoint(folder / "models_checkpoints/best.pt")["epoch"] > 1
    refused(train(trained, "", n_epochs=2), "n_epochs: 3 then, 2 now")
