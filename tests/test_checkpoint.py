"""Checkpoints are whole or refused; disks that fill up, vanish or refuse do not cost what was there."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from manage.checkpoint import FORMAT, DamagedCheckpoint, keep_newest, load_checkpoint, newest_valid, pack
from tests.factory import REPO, records, train
from tests.kill import before_step, fail_at
from utils.errors import UserError
from utils.files import write_whole

STATE = {"model": {"weight": torch.arange(40.0)}, "config": {}, "tree": {}, "epoch": 3}


def write(path: Path, **changes) -> bytes:
    data = pack(STATE | changes)
    write_whole(data, path)
    return data


# --- the file ---
def test_every_truncation_is_seen_and_every_changed_bit_or_it_changes_nothing(tmp_path):
    path, chance, seen = tmp_path / "a.pt", random.Random(0), 0
    data = write(path)
    assert torch.load(path, weights_only=True)["epoch"] == 3, "torch alone can read it"
    for length in chance.sample(range(len(data)), 100):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedCheckpoint, match=r"a\.pt"):
            load_checkpoint(path)
    for position in chance.sample(range(len(data)), 300):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:  # a zip holds bytes that no reader looks at: times, padding
            state = load_checkpoint(path)
            assert torch.equal(state.pop("model")["weight"], STATE["model"]["weight"])
            assert state == {key: value for key, value in STATE.items() if key != "model"} | {"format": FORMAT}
        except DamagedCheckpoint:
            seen += 1
    assert seen > 150


class Malicious:
    """Would make the folder "victim" if it were unpickled."""

    def __reduce__(self):
        return os.mkdir, ("victim",)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(STATE | {"format": 1, "extra": Malicious()}, "a.pt")
    with pytest.raises(DamagedCheckpoint, match="Python objects"):
        load_checkpoint("a.pt")
    Path("a.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt"):
        load_checkpoint("a.pt")
    assert not Path("victim").exists()


def test_a_whole_file_that_lacks_something_is_no_checkpoint(tmp_path):
    for key in ("model", "config", "tree", "epoch", "format"):
        torch.save(STATE | {"format": FORMAT} | {key: "nonsense"}, tmp_path / "a.pt")
        with pytest.raises(DamagedCheckpoint, match=f"no usable '{key}'"):
            load_checkpoint(tmp_path / "a.pt")
    torch.save(STATE | {"format": FORMAT + 1}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"is of format {FORMAT + 1}, this version reads up to {FORMAT}"):
        load_checkpoint(tmp_path / "a.pt")


# --- which file ---
def write_in_order(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write(folder / f"{name}.pt")
        os.utime(folder / f"{name}.pt", (number, number))


def test_the_newest_whole_one_is_found_and_the_damaged_are_named(tmp_path):
    assert newest_valid(tmp_path) is None
    write_in_order(tmp_path, "checkpoint_1", "previous", "checkpoint_2", "last")
    said = []
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "checkpoint_2.pt").write_bytes(b"PK")
    os.utime(tmp_path / "checkpoint_2.pt", (3, 3))
    assert newest_valid(tmp_path, said.append) == tmp_path / "previous.pt"
    assert [text.split(":")[0].rpartition("/")[2] for text in said] == ["last.pt", "checkpoint_2.pt"]
    assert sorted(p.name for p in tmp_path.glob("*.damaged")) == ["checkpoint_2.damaged", "last.damaged"]
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="none of its 2 checkpoints is whole"):  # nothing is begun anew
        newest_valid(tmp_path, lambda _: None)


def test_one_that_the_disk_does_not_give_is_not_taken_for_damaged(tmp_path, monkeypatch):
    write_in_order(tmp_path, "previous", "last")
    monkeypatch.setattr(Path, "read_bytes", lambda path: os.read(99, 1))  # EBADF
    with pytest.raises(UserError, match=r"last\.pt: cannot be read \(Bad file descriptor\)") as raised:
        newest_valid(tmp_path)
    assert not isinstance(raised.value, DamagedCheckpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_keep_removes_the_oldest_numbered_ones_only(tmp_path):
    # checkpoint_2: of a run that began again from checkpoint_1
    write_in_order(tmp_path, *"checkpoint_9 best last previous checkpoint_10 checkpoint_11 checkpoint_2".split())
    keep_newest(tmp_path, 2)
    assert {path.stem for path in tmp_path.iterdir()} == {"best", "checkpoint_11", "checkpoint_2", "last", "previous"}


# --- runs ---
KEYS = {"n_epochs": 3, "n_train_photos": 4, "n_val_photos": 1, "monitor": "min mIoU3"}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "experiments" / "tiny" / "models_checkpoints"


NO_CHECKPOINT = "warning: no checkpoint could be written"
DISKS = {  # a fault, from the start or at one moment; status; how often a checkpoint could not be written, and why
    "takes no large file": ((resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000)), 2, 3, "File too large"),
    "full for a while": ((fail_at, "open", "*/.best.pt.*.part"), 0, 1, "No space left on device"),
    "read-only for a while": ((fail_at, "open", "*/.last.pt.*.part", 1, errno.EROFS), 0, 1, "Read-only file system"),
    "read-only at the end": ((fail_at, "open", "*/.last.pt.*.part", 3, errno.EROFS), 2, 1, "Read-only file system"),
    "cannot sync folders, as network disks": ((fail_at, "open", "*/models_checkpoints"), 0, 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("disk", DISKS)
def test_a_disk_that_takes_no_checkpoint_is_said_and_what_there_was_stands(data, folder, tmp_path, disk):
    fault, status, times, reason = DISKS[disk]
    output = train(tmp_path, data, status=status, prepare=[fault], **KEYS)
    assert output.count(NO_CHECKPOINT) == output.count(f"{reason}); the older ones stand") == times
    assert output.count("error: the last checkpoint was not written") == (status == 2)
    assert not list(folder.glob(".*")), "nothing half-written stays"
    if status == 2:
        train(tmp_path, data, "--resume", **KEYS)
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2, 3]
    assert load_checkpoint(folder / "last.pt")["epoch"] == 3
    best = load_checkpoint(folder / "best.pt")["epoch"]
    assert best > 1 or disk != "full for a while", "the best of epoch 1 was not written"


@pytest.mark.slow
def test_a_vanished_folder_is_made_anew_and_the_run_can_be_resumed(data, tmp_path):
    output = train(tmp_path, data, prepare=[(before_step, 2, shutil.rmtree, tmp_path / "experiments")], **KEYS)
    assert "models_checkpoints has vanished; it is made anew" in output
    assert "is finished" in train(tmp_path, data, "--resume", **KEYS)


# Made with these keys on `data`: checkpoint_3 and the losses of epoch 4. Where a format or default changes on purpose,
# the old file stays, and one of the new format goes beside it.
KEPT = {"optimizer": "adamw", "lr": 0.003, "ema_decay": 0.9, "n_epochs": 4, "color_jitter": 0.3, "n_train_photos": 6}


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((REPO / "tests/kept").glob("*.pt")), ids=lambda file: file.stem)
def test_a_checkpoint_of_an_earlier_commit_is_gone_on_from_with_the_same_losses(data, tmp_path, file):
    train(tmp_path, data, "--resume", file, exp_name="new", **KEPT)
    (epoch,) = records(tmp_path, "new")
    expected = json.loads(file.with_suffix(".json").read_text())
    assert [epoch["loss_train"], epoch["loss_val"]] == pytest.approx(expected, rel=1e-3)
