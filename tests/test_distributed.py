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

from configs.config import config_from_dict, save_config
from manage.checkpoint import load_checkpoint
from tests.conftest import REPO
from tests.factory import Child

pytestmark = pytest.mark.slow
PATIENCE = 400  # seconds; it takes a few, but machines can be busy
SMALL = {
    "pretrained": False,
    "prior_bias": False,
    "crop_size": 32,
    "decoder_channels": [8, 8, 8, 8, 8],
    "freeze_batchnorm": True,
    "n_epochs": 2,
    "num_workers": 0,
    "device": "cpu",
    "log_every": 1,
    "save_epoch": 1,
}


@pytest.fixture
def config_file(tmp_path, sample_data):
    """Writes a config with some keys changed and returns its path."""

    def write(**keys) -> Path:
        values = SMALL | {"root_dir": str(tmp_path), "root_data_dir": str(sample_data)} | keys
        path = tmp_path / "config.json"
        save_config(config_from_dict(values, "the test"), path)
        return path

    return write


def command(processes: int, script: str, *arguments) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(REPO / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def computed(processes: int, script: str, *arguments) -> str:
    """What processes print that torchrun's own variables alone tell of each other: they start in no time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [arguments[1].with_name(f"rank{rank}-{time.monotonic_ns()}.txt") for rank in range(processes)]
    children = [
        Child(script, *arguments, log=log, prepare=(be_rank, rank, processes, port)) for rank, log in enumerate(logs)
    ]
    assert [child.wait() for child in children] == [0] * processes, [child.output for child in children]
    return "".join(child.output for child in children)


def be_rank(rank: int, world: int, port: int) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost", **{key: str(value) for key, value in values.items()}}


def folder(cfg: Path, name: str) -> Path:
    return cfg.parent / "experiments" / name


def weights(cfg: Path, name: str, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder(cfg, name) / "models_checkpoints" / f"{checkpoint}.pt")["model"]


def assert_same(one: dict, other: dict) -> None:
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_to_the_weights_and_scores_of_one(config_file, accumulate):
    cfg = config_file()
    computed(1, "train.py", "--cfg", cfg, "exp_name=one", f"batch_size={2 * accumulate}")
    output = computed(2, "train.py", "--cfg", cfg, "exp_name=two", "batch_size=1", f"accumulate={accumulate}")
    assert f"steps of {2 * accumulate} photos (1 x {accumulate} accumulated x 2 processes)" in output
    # With accumulation a step holds the same four photos, in another order.
    assert_same(weights(cfg, "one"), weights(cfg, "two"))
    start, end = weights(cfg, "one", "checkpoint_1"), weights(cfg, "one")
    assert max((end[key] - start[key]).abs().max() for key in end) > 1e-4  # there was something to compare
    lines = [
        [json.loads(line) for line in (folder(cfg, name) / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*lines, strict=True):
        assert two["loss_train"] == pytest.approx(one["loss_train"], rel=1e-4)
        assert two["loss_val"] == pytest.approx(one["loss_val"], rel=1e-4)


def test_two_processes_evaluate_to_exactly_the_scores_of_one(config_file):
    cfg = config_file(exp_name="scored", n_epochs=1, batch_size=2)
    computed(1, "train.py", "--cfg", cfg)
    results = []
    for processes, photos in ((1, 3), (2, 3)):  # an odd number: the processes have unequal shares
        options = ("--checkpoint", "last", "--limit", photos, "--decode", "all")
        assert computed(processes, "evaluate.py", "--cfg", cfg, *options).count("pixel accuracy") == 1
        place = folder(cfg, "scored") / "evaluation" / "last-limit3"
        record = json.loads((place / "scores.json").read_text())
        assert record["photos"] == photos
        assert {scores["violation_rate"] for scores in record["rules"].values()} == {record["scores"]["violation_rate"]}
        assert len(list((place / "pictures" / "overlay").iterdir())) == photos
        page = (place / "index.html").read_text(encoding="utf-8")
        shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["photos"]
        maps = {script.name: script.read_text() for script in (place / "pictures" / "report").glob("*.js")}
        assert len(shown) == len(maps) == photos
        with np.load(place / "photos.npz") as per_photo:
            counts = {k: per_photo[k] for k in per_photo}
        results.append((record["scores"], record["levels"], record["rules"], shown, maps, counts))
    one, two = results
    assert one[:-1] == two[:-1]
    assert all(np.array_equal(one[-1][key], two[-1][key]) for key in one[-1])


class started:
    """A training in the background; killed at the end whatever happens."""

    def __init__(self, processes: int, cfg: Path, *arguments) -> None:
        self.log = cfg.with_name(f"output-{time.monotonic_ns()}.txt")
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                command(processes, "train.py", "--cfg", cfg, *arguments),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        self.send_signal = self.process.send_signal

    def __enter__(self) -> "started":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @property
    def returncode(self) -> int:
        return self.process.returncode

    def output(self) -> str:
        return self.log.read_text()

    def end(self) -> str:
        """Waits for the end and returns all it has said."""
        self.process.wait(PATIENCE)
        return self.output()

    def wait_for(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.05)

    def pid_of_rank(self, rank: int) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        marked = f"RANK={rank}".encode()
        return next(int(pid) for pid in children if marked in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def test_a_killed_process_ends_the_run_which_resumes_with_any_number(config_file):
    cfg = config_file(exp_name="killed", n_epochs=500, batch_size=1, num_workers=1)
    checkpoints = folder(cfg, "killed") / "models_checkpoints"
    with started(2, cfg) as run:
        run.wait_for(lambda: (checkpoints / "last.pt").exists())
        os.kill(run.pid_of_rank(1), signal.SIGKILL)
        output = run.end()
    assert run.returncode != 0
    assert output.count("error: a process of this run is gone") == 1

    with started(2, cfg, "--resume") as run:
        run.wait_for(lambda: "experiment 'killed'" in run.output())
        run.send_signal(signal.SIGTERM)  # torchrun passes it on to all
        output = run.end()
    assert output.count("resumed from") == 1
    assert output.count("stopped by SIGTERM") == 1
    assert "error: " not in output

    with started(1, cfg, "--resume") as run:
        run.wait_for(lambda: "experiment 'killed'" in run.output())
        run.send_signal(signal.SIGTERM)
        output = run.end()
    assert "2 processes before, 1 now: a step takes 1 photos from here on" in output


def fault(cfg: Path) -> str:
    """What two processes print that end with an error; it is told once, at the end of torchrun's own thirty lines."""
    with started(2, cfg) as run:
        output = run.end()
    assert run.returncode != 0
    *_, last, ruler = output.strip().splitlines()
    assert last.startswith("  error: "), output
    assert set(ruler) == {"="}
    assert output.count("error: ") == 1, output
    return last


def test_a_fault_in_one_process_ends_all_and_is_told_once(config_file, sample_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample_data, data)
    damaged = (data / "train_id.txt").read_text().split()[0]
    next((data / "JPEGImages").glob(f"{damaged}.*")).write_bytes(b"not a photo")
    cfg = config_file(exp_name="faulty", batch_size=3, root_data_dir=str(data))
    assert damaged in fault(cfg)


def test_a_loss_that_is_not_finite_names_the_photos_of_all_processes(config_file, sample_data):
    cfg = config_file(exp_name="wild", lr=100, batch_size=1, n_epochs=50)
    ids = re.search(r"is not finite\. Photos: (\S+), (\S+)\. The checkpoints in", fault(cfg)).groups()
    assert len(set(ids)) == 2
    assert set(ids) <= set((sample_data / "train_id.txt").read_text().split())
    assert not list(folder(cfg, "wild").glob("models_checkpoints/*.pt"))


def test_a_process_that_hangs_is_noticed_and_the_run_resumes(config_file):
    cfg = config_file(exp_name="hung", n_epochs=500, batch_size=1, timeout_minutes=0.1)
    with started(2, cfg) as run:
        run.wait_for(lambda: (folder(cfg, "hung") / "models_checkpoints" / "last.pt").exists())
        stopped = run.pid_of_rank(1)
        os.kill(stopped, signal.SIGSTOP)
        run.wait_for(lambda: "closing signal SIGTERM" in run.output())  # which a stopped process does not hear
        os.kill(stopped, signal.SIGKILL)
        output = run.end()
    assert output.count("error: a process of this run is gone or hangs") == 1
    with started(1, cfg, "--resume") as run:
        run.wait_for(lambda: "resumed from" in run.output() and "experiment 'hung'" in run.output())
