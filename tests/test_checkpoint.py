"""Checkpoints are whole or refused; disks that fill up, vanish or refuse do not cost what was there."""

import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from manage.checkpoint import (
    FORMAT,
    DamagedCheckpoint,
    find_checkpoint,
    keep_newest,
    load_checkpoint,
    newest_valid,
    pack,
)
from tests.conftest import REPO
from tests.factory import Child, make_data, records, run, write_config
from tests.kill import before_step, fail_at, wait_until_there
from utils.errors import UserError
from utils.files import write_whole

STATE = {"model": {"weight": torch.arange(40.0)}, "config": {}, "tree": {}, "epoch": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("checkpoint") / "data", train=4, val=1)


@pytest.fixture
def train(data, tmp_path):
    """Trains in tmp_path and returns exit status and output."""

    def start(*arguments, prepare=(), **keys):
        keys = {"n_epochs": 2} | keys
        cfg = write_config(tmp_path, data, **keys)
        return run("train.py", "--cfg", cfg, *arguments, log=tmp_path / "log", prepare=prepare)

    return start


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "experiments" / "tiny" / "models_checkpoints"


def write(path: Path, **changes) -> bytes:
    data = pack(STATE | changes)
    write_whole(data, path)
    return data


# --- the file ---
def test_what_is_saved_comes_back_and_torch_alone_can_read_it(tmp_path):
    write(tmp_path / "a.pt")
    assert torch.equal(load_checkpoint(tmp_path / "a.pt")["model"]["weight"], torch.arange(40.0))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_every_truncation_is_seen(tmp_path):
    data = write(tmp_path / "a.pt")
    for length in random.Random(0).sample(range(len(data)), 100):
        (tmp_path / "a.pt").write_bytes(data[:length])
        with pytest.raises(DamagedCheckpoint, match=r"a\.pt"):
            load_checkpoint(tmp_path / "a.pt")


def test_every_changed_bit_is_seen_or_changes_nothing(tmp_path):
    data, seen = write(tmp_path / "a.pt"), 0
    for position in random.Random(0).sample(range(len(data)), 300):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (tmp_path / "a.pt").write_bytes(changed)
        try:  # a zip holds bytes that no reader looks at: times, padding
            state = load_checkpoint(tmp_path / "a.pt")
            assert torch.equal(state.pop("model")["weight"], STATE["model"]["weight"])
            assert state == {key: value for key, value in STATE.items() if key != "model"} | {"format": FORMAT}
        except DamagedCheckpoint:
            seen += 1
    assert seen > 150


def test_a_checkpoint_of_a_newer_format_says_so(tmp_path):
    state = STATE | {"format": FORMAT + 1}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"newer version \(format {FORMAT + 1}, this one reads up to {FORMAT}\)"):
        load_checkpoint(tmp_path / "a.pt")


class Malicious:
    """Would make the file `victim` if it were unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("disguise", ["pickle", "torch archive"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, disguise):
    path, victim = tmp_path / "a.pt", tmp_path / "victim"
    content = STATE | {"format": 1, "extra": Malicious(victim)}
    if disguise == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(DamagedCheckpoint, match="Python objects" if "torch" in disguise else r"a\.pt"):
        load_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize("key", ["model", "config", "tree", "epoch"])
def test_a_whole_file_that_lacks_something_is_no_checkpoint(tmp_path, key):
    write(tmp_path / "a.pt", **{key: "nonsense"})
    with pytest.raises(DamagedCheckpoint, match=key):
        load_checkpoint(tmp_path / "a.pt")


def test_a_failing_disk_leaves_the_old_file_and_no_other(tmp_path):
    before = write(tmp_path / "a.pt")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "a.pt", epoch=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


NO_SYNC = """
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int fsync(int file) {
    struct stat s;
    if (fstat(file, &s) == 0 && S_ISDIR(s.st_mode)) { errno = EINVAL; return -1; }
    return ((int (*)(int))dlsym((void *)-1L, "fsync"))(file);
}
"""


@pytest.mark.slow
def test_a_disk_that_cannot_sync_folders_takes_files_all_the_same(tmp_path):
    """Network disks (CIFS, FUSE); this one is preloaded into a process."""
    (tmp_path / "disk.c").write_text(NO_SYNC)
    library, compiler = tmp_path / "disk.so", shutil.which("gcc") or shutil.which("cc")
    build = [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "disk.c", "-ldl"]
    if compiler is None or subprocess.run(build, capture_output=True, check=False).returncode:
        pytest.skip("needs a C compiler")
    code = (
        "import os, sys; from utils.files import write_whole; write_whole('new', sys.argv[1] + '/a')\n"
        "try: os.fsync(os.open(sys.argv[1], os.O_RDONLY))\n"
        "except OSError as error: print(error)"
    )
    environment = os.environ | {"LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    assert "Invalid argument" in done.stdout, "the disk is of that kind"
    assert (tmp_path / "a").read_text() == "new"


# --- which file ---
def test_the_newest_whole_one_is_found_and_the_damaged_are_named(tmp_path):
    for name, epoch in (("checkpoint_1", 1), ("previous", 2), ("checkpoint_2", 2), ("last", 3)):
        write(tmp_path / f"{name}.pt", epoch=epoch)
        time.sleep(0.01)
    said = []
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "checkpoint_2.pt").write_bytes(b"PK")
    assert newest_valid(tmp_path, said.append) == tmp_path / "previous.pt"
    assert [text.split(":")[0].rpartition("/")[2] for text in said] == ["last.pt", "checkpoint_2.pt"]
    assert sorted(p.name for p in tmp_path.glob("*.damaged")) == ["checkpoint_2.damaged", "last.damaged"]


def test_without_any_whole_checkpoint_nothing_is_begun_anew(tmp_path):
    assert newest_valid(tmp_path) is None
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="none of its 1 checkpoints is whole"):
        newest_valid(tmp_path, lambda _: None)


def test_keep_removes_the_oldest_numbered_ones_only(tmp_path):
    for name in ("checkpoint_9", "best", "last", "previous", "checkpoint_10", "checkpoint_11", "checkpoint_2"):
        write(tmp_path / f"{name}.pt")  # checkpoint_2: of a run that began again from checkpoint_1
        time.sleep(0.01)
    keep_newest(tmp_path, 2)
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        "best",
        "checkpoint_11",
        "checkpoint_2",
        "last",
        "previous",
    ]


def test_a_missing_checkpoint_is_answered_with_those_that_are_there(tmp_path):
    write(tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"'lst'.*holds best\.pt"):
        find_checkpoint("lst", tmp_path, tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        find_checkpoint("x" * 5000, tmp_path, tmp_path)


# --- runs ---
def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_disk_that_takes_no_checkpoint_is_said_and_the_run_ends_with_an_error(train, folder, tmp_path):
    status, output = train(prepare=(limit_file_size, 100_000))
    assert status == 2
    assert output.count("warning: no checkpoint could be written") == 2  # one at the end of each epoch, no other
    assert "error: the last checkpoint could not be written" in output
    assert list(folder.iterdir()) == [], "nothing half-written stays"
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2]
    status, output = train("--resume")
    assert status == 0, output
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_a_disk_that_has_room_again_gets_the_next_checkpoint_and_the_best(train, folder):
    status, output = train(n_epochs=3, prepare=(fail_at, "open", "*/.best.pt.*.part"), monitor="min mIoU3")
    assert status == 0, output
    assert "No space left on device); the older ones stand" in output
    assert load_checkpoint(folder / "last.pt")["epoch"] == 3
    best = load_checkpoint(folder / "best.pt")
    assert best["best"] is not None
    assert best["epoch"] > 1, "the best of epoch 1 was not written, so a later one is the best there is"


@pytest.fixture
def waiting(data, tmp_path):
    """A run that waits in its second epoch; and what lets it go on."""
    cfg = write_config(tmp_path, data, n_epochs=2)
    prepare = (before_step, 2, wait_until_there, str(tmp_path / "go"))
    child = Child("train.py", "--cfg", cfg, log=tmp_path / "log", prepare=prepare)
    child.wait_for("waiting")
    yield child, (tmp_path / "go").touch
    child.process.kill()


@pytest.mark.slow
def test_a_vanished_folder_is_made_anew_and_the_run_can_be_resumed(waiting, train, tmp_path):
    child, go_on = waiting
    shutil.rmtree(tmp_path / "experiments")
    go_on()
    assert child.wait() == 0, child.output
    assert "models_checkpoints has vanished; it is made anew" in child.output
    status, output = train("--resume")
    assert (status, "is finished" in output) == (0, True), output


@pytest.fixture
def read_only():
    """Makes a folder read-only, for root too, until the test ends."""
    made = []

    def make(folder: Path) -> None:
        bind, seal = ["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]
        if shutil.which("mount") is None or subprocess.run(bind, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount")
        made.append(folder)
        subprocess.run(seal, check=True)

    yield make
    for folder in made:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_before_training(data, tmp_path, read_only):
    out = tmp_path / "out"
    out.mkdir()
    read_only(out)
    cfg = write_config(tmp_path, data, root_dir=str(out))
    status, output = run("train.py", "--cfg", cfg, log=tmp_path / "log")
    assert status == 2, output
    assert f"error: {out / 'experiments'}: cannot be written (Read-only file system); set root_dir" in output


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_keeps_what_there_was(waiting, folder, read_only):
    child, go_on = waiting
    read_only(folder)
    go_on()
    assert child.wait() == 2, child.output
    assert "Read-only file system); the older ones stand" in child.output
    assert load_checkpoint(folder / "last.pt")["epoch"] == 1
