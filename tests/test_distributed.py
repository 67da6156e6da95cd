"""Two processes compute what one computes, write once, and end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from manage.checkpoint import load_checkpoint
from tests.conftest import REPO
from tests.factory import Child, write_config

pytestmark = pytest.mark.slow
PATIENCE = 400  # seconds; it takes a few, but machines can be busy


@pytest.fixture
def config_file(tmp_path, sample_data):
    """Writes a config with some keys changed and returns its path."""
    own = {"freeze_batchnorm": True, "criterion": "bce", "n_epochs": 2, "keep": 5}
    return lambda **keys: write_config(tmp_path, sample_data, **own | keys)


def folder(cfg: Path, name: str) -> Path:
    return cfg.parent / "experiments" / name


def weights(cfg: Path, name: str, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder(cfg, name) / "models_checkpoints" / f"{checkpoint}.pt")["model"]


# --- without torchrun, whose variables are all that processes need: they start in no time ---
def computed(processes: int, script: str, cfg: Path, *arguments, status: int = 0) -> str:
    """What processes print that know of each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [
        Child(script, "--cfg", cfg, *arguments, log=log, prepare=(be_rank, rank, processes, port))
        for rank, log in enumerate(cfg.with_name(f"rank{rank}-{port}.txt") for rank in range(processes))
    ]
    assert [child.wait() for child in children] == [status] * processes, [child.output for child in children]
    return "".join(child.output for child in children)


def be_rank(rank: int, world: int, port: int) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost", **{key: str(value) for key, value in values.items()}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_to_the_weights_and_scores_of_one(config_file, accumulate):
    cfg = config_file()
    computed(1, "train.py", cfg, "exp_name=one", f"batch_size={2 * accumulate}")
    output = computed(2, "train.py", cfg, "exp_name=two", "batch_size=1", f"accumulate={accumulate}")
    assert f"steps of {2 * accumulate} photos (1 x {accumulate} accumulated x 2 processes)" in output
    # With accumulation a step holds the same four photos, in another order.
    start, end, other = weights(cfg, "one", "checkpoint_1"), weights(cfg, "one"), weights(cfg, "two")
    torch.testing.assert_close(dict(other), dict(end), rtol=1e-4, atol=1e-6)
    assert max((end[key] - start[key]).abs().max() for key in end) > 1e-4  # there was something to compare
    lines = [(folder(cfg, name) / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*lines, strict=True):
        for key in ("loss_train", "loss_val"):
            assert json.loads(two)[key] == pytest.approx(json.loads(one)[key], rel=1e-4)


def test_two_processes_evaluate_to_exactly_the_scores_of_one(config_file):
    cfg, results = config_file(exp_name="scored", n_epochs=1), []
    computed(1, "train.py", cfg)
    place = folder(cfg, "scored") / "evaluation" / "last-limit3"
    for processes in (1, 2):  # an odd number of photos: the processes have unequal shares
        options = ("--checkpoint", "last", "--limit", 3, "--decode", "all")
        assert computed(processes, "evaluate.py", cfg, *options).count("pixel accuracy") == 1
        record = json.loads((place / "scores.json").read_text())
        assert len(list((place / "pictures" / "overlay").iterdir())) == record["photos"] == 3
        page = (place / "index.html").read_text(encoding="utf-8")
        shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["photos"]
        maps = {script.name: script.read_text() for script in (place / "pictures" / "report").glob("*.js")}
        assert len(shown) == len(maps) == 3
        with np.load(place / "photos.npz") as per_photo:
            counts = {key: per_photo[key].tolist() for key in per_photo}
        results.append((record["scores"], record["levels"], record["rules"], shown, maps, counts))
    assert results[0] == results[1]


def test_a_loss_that_is_not_finite_names_the_photos_of_all_processes(config_file, sample_data):
    cfg = config_file(exp_name="wild", lr=100, batch_size=1, n_epochs=50)
    output = computed(2, "train.py", cfg, status=2)
    ids = re.search(r"is not finite\. Photos: (\S+), (\S+)\. The checkpoints in", output).groups()
    assert len(set(ids)) == 2
    assert set(ids) <= set((sample_data / "train_id.txt").read_text().split())


# --- with torchrun ---
class Launched:
    """Two processes of train.py in the background; killed at the end whatever happens."""

    def __init__(self, cfg: Path, *arguments) -> None:
        self.log = cfg.with_name(f"output-{time.monotonic_ns()}.txt")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *launcher, str(REPO / "train.py"), "--cfg", str(cfg), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def end(self) -> str:
        """Waits for the end and returns all it has said."""
        self.process.wait(PATIENCE)
        return self.log.read_text()

    def fault(self) -> str:
        """The error that ends it: told once, at the end of torchrun's own thirty lines."""
        output = self.end()
        assert self.process.returncode != 0
        *_, last, ruler = output.strip().splitlines()
        assert last.startswith("  error: "), output
        assert set(ruler) == {"="}
        assert output.count("error: ") == 1, output
        return last

    def wait_for(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def wait_for_words(self, text: str) -> None:
        self.wait_for(lambda: text in self.log.read_text())

    def pid_of_rank(self, rank: int) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        marked = f"RANK={rank}".encode()
        return next(int(pid) for pid in children if marked in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def test_a_fault_in_one_process_ends_all_and_is_told_once(config_file, sample_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample_data, data)
    damaged = (data / "train_id.txt").read_text().split()[0]
    next((data / "JPEGImages").glob(f"{damaged}.*")).write_bytes(b"not a photo")
    with Launched(config_file(exp_name="faulty", batch_size=3, root_data_dir=str(data))) as run:
        assert damaged in run.fault()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_hanging_process_ends_the_run_and_it_resumes(config_file, number):
    cfg = config_file(exp_name="hurt", n_epochs=500, batch_size=1, num_workers=1, timeout_minutes=0.1)
    with Launched(cfg) as run:
        run.wait_for((folder(cfg, "hurt") / "models_checkpoints" / "last.pt").exists)
        hurt = run.pid_of_rank(1)
        os.kill(hurt, number)
        if number == signal.SIGSTOP:
            run.wait_for_words("closing signal SIGTERM")  # which a stopped process does not hear
            os.kill(hurt, signal.SIGKILL)
        assert "a process of this run is gone or hangs" in run.fault()
    if number == signal.SIGKILL:
        with Launched(cfg, "--resume") as run:
            run.wait_for_words("experiment 'hurt'")
            run.process.send_signal(signal.SIGTERM)  # torchrun passes it on to all
            output = run.end()
        assert (output.count("resumed from"), output.count("stopped by SIGTERM")) == (1, 1), output
        assert "error: " not in output


def test_a_run_of_two_processes_goes_on_with_one(config_file):
    slim = config_file(exp_name="slim", batch_size=1, n_epochs=1)
    computed(2, "train.py", slim)
    output = computed(1, "train.py", slim, "n_epochs=2", "--resume")
    assert "2 processes before, 1 now: a step takes 1 photos from here on" in output
