"""A user's mistakes: each ends in one message that says what is wrong and where, before any work is done."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from PIL import Image

import models.hseg
from configs.config import Config
from manage.checkpoint import load_checkpoint, pack
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from manage.train_manager import TrainManager
from tests.conftest import REPO
from tests.factory import TINY, TREE, make_data
from tests.preloaded import SlimEncoder
from utils.errors import UserError
from utils.files import write_whole


@pytest.fixture(autouse=True)
def slim(monkeypatch):
    """None of these mistakes is the encoder's, so a small one stands in for the ResNet."""
    monkeypatch.setattr(models.hseg, "build_encoder", SlimEncoder)


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 50}, "batch_size 50 is more than this run has room for; 4 is used"),
        ({"warmup_epochs": 1.0}, "warmup_epochs 1 is more than this run has room for; 0.5 is used"),
        ({"val_every": 5, "save_epoch": 1}, "val_every 5 is more than this run has room for; 1 is used"),
        ({"batch_size": 1, "freeze_batchnorm": True}, "1 epochs of 4 steps"),
    ],
)
def test_a_value_that_is_too_large_is_cut_and_said(keys, capsys, changes, said):
    assert train(keys, **changes)() == 0
    assert said in capsys.readouterr().out


def test_an_id_that_the_encoding_does_not_list_is_refused_though_there_is_a_label_map(keys, tmp_path):
    data = tmp_path / "data"
    for name in ("JPEGImages/{}.jpg", "gt_masks_hie/{}.png"):
        shutil.copy(data / name.format("p00"), data / name.format("stale"))
    with open(data / "val_id.txt", "a") as ids:
        ids.write("stale\n")
    refused(train(keys), "val_id.txt: 1 of ", "first: stale", "gt_masks_hie", "dataset_hie_enc")
    assert train(keys, n_val_photos=2)() == 0, "it is not among the first"
    refused(evaluate(keys, "last"), "val_id.txt: 1 of ", "first: stale")


def test_an_experiment_is_never_overwritten(trained, tmp_path):
    before = (tmp_path / "experiments/tiny/models_checkpoints/last.pt").read_bytes()
    refused(train(trained, lr=0.5), "tiny", "--resume", "--overwrite")
    refused(train(trained, "", lr=0.5), "lr")
    assert (tmp_path / "experiments/tiny/models_checkpoints/last.pt").read_bytes() == before
    assert train(trained, overwrite=True, lr=0.5)() == 0
    (aside,) = (tmp_path / "experiments").glob("tiny.old-*")
    assert (aside / "models_checkpoints/last.pt").read_bytes() == before


HOLD = """
import sys, pathlib
from utils.locks import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
lock.folder.mkdir(parents=True)
lock.take()
print(flush=True)
input()
"""


@pytest.mark.slow
def test_a_second_process_in_an_experiment_is_refused_and_a_stale_lock_is_taken_over(keys, tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, tmp_path / "experiments/tiny"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO) as owner:
        owner.stdout.readline()
        refused(train(keys), f"in use by process {owner.pid} on {socket.gethostname()} since 2", "choose another")
        owner.kill()
    assert train(keys)() == 0
    assert f"the lock of process {owner.pid} on" in capsys.readouterr().out


def test_a_lock_of_another_machine_is_taken_over_when_told(keys, tmp_path, capsys):
    signature = tmp_path / "experiments/tiny/.owner.json"
    signature.parent.mkdir(parents=True)
    signature.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "noon"}))
    refused(train(keys), "was locked by process 1 on elsewhere since noon", "--take-over", "both would write")
    assert train(keys, take_over=True)() == 0
    assert "the lock of process 1 on elsewhere since noon is taken over" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_does_not_go_on_with_other_photos(trained, tmp_path, split):
    path = tmp_path / "data" / f"{split}_id.txt"
    ids = path.read_text().split()
    path.write_text("\n".join(ids[::-1]) + "\n")
    refused(train(trained, ""), f"{split}_id.txt", "other photos", "last.pt", "put the old ones back")
    path.write_text("\r\n".join(ids))
    assert train(trained, "")() == 0


def test_a_run_does_not_go_on_with_a_changed_tree(keys, tmp_path):
    path, tree = tmp_path / "tree.json", json.loads(TREE.read_text())
    path.write_text(json.dumps(tree))
    keys["hierarchy"] = str(path)
    assert train(keys)() == 0
    tree["nodes"][1]["colour"] = [1, 2, 3]
    path.write_text(json.dumps(tree))
    assert train(keys, "")() == 0
    tree["levels"][2] = "whole"
    path.write_text(json.dumps(tree))
    refused(train(keys, ""), f"the tree {path} has other levels", "last.pt")


def test_a_checkpoint_of_another_tree_is_refused(trained, tmp_path):
    folder = tmp_path / "experiments/tiny/models_checkpoints"
    state = load_checkpoint(folder / "last.pt")
    state["tree"]["nodes"][1]["name"] = "forearm"
    write_whole(pack(state), folder / "tree.pt")
    refused(evaluate(trained, "tree"), "encoding.json", "tree")


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(keys, tmp_path):
    manager = TrainManager(Config(**keys | {"n_epochs": 2}))
    load = manager.loader._batch

    def infinite(*arguments):
        batch = load(*arguments)
        return batch._replace(image=batch.image * float("inf")) if manager.step == 3 else batch

    manager.loader._batch = infinite
    refused(manager.run, "step 4 (epoch 2): loss nan", "not finite", "Photos: p0", "from before it", "grad_clip")
    last = load_checkpoint(tmp_path / "experiments/tiny/models_checkpoints/last.pt")
    assert (last["step"], last["epoch"]) == (2, 1)
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


def test_a_finished_run_goes_on_with_more_epochs(trained, tmp_path, capsys):
    folder = tmp_path / "experiments/tiny"
    (folder / "models_checkpoints/best.pt").unlink()  # then it is no longer the one to beat
    refused(train(trained, n_epochs=3), "exists already", "--resume")
    assert train(trained, "", n_epochs=3)() == 0
    output = capsys.readouterr().out
    assert "resumed from" in output
    assert "epoch 3/3" in output
    assert json.loads((folder / "configs/tiny.json").read_text())["n_epochs"] == 3
    assert load_checkpoint(folder / "models_checkpoints/best.pt")["epoch"] > 1
    refused(train(trained, "", n_epochs=2), "n_epochs: 3 then, 2 now")
