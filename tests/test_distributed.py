"""Two processes compute what one computes, write once, and end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from manage.checkpoint import load_checkpoint
from tests.factory import REPO, Child, records, write_config

pytestmark = pytest.mark.slow
MORE = ("n_epochs=3", "--resume")


@pytest.fixture
def config_file(tmp_path, sample_data):
    """Writes a config with some keys changed and returns its path."""
    own = {"freeze_batchnorm": True, "criterion": "bce", "n_epochs": 2, "keep": 5}
    return lambda **keys: write_config(tmp_path, sample_data, **own | keys)


def folder(cfg: Path, name: str) -> Path:
    return cfg.parent / "experiments" / name


def weights(cfg: Path, name: str, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder(cfg, name) / "models_checkpoints" / f"{checkpoint}.pt")["model"]


def started(processes: int, script: str, cfg: Path, *arguments) -> list[Child]:
    """Processes that know of each other, without torchrun: its variables are all that they need."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [cfg.with_name(f"rank{rank}-{port}.txt") for rank in range(processes)]
    ranks = [{"log": log, "prepare": [(be_rank, rank, processes, port)]} for rank, log in enumerate(logs)]
    return [Child(script, "--cfg", cfg, *arguments, **rank) for rank in ranks]


def ended(children: list[Child], status: int = 0) -> str:
    """What they have printed."""
    assert [child.wait() for child in children] == [status] * len(children), [child.output for child in children]
    return "".join(child.output for child in children)


def computed(processes: int, script: str, cfg: Path, *arguments, status: int = 0) -> str:
    return ended(started(processes, script, cfg, *arguments), status)


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
    for one, two in zip(records(cfg.parent, "one"), records(cfg.parent, "two"), strict=True):
        for key in ("loss_train", "loss_val"):
            assert two[key] == pytest.approx(one[key], rel=1e-4)
    output = computed(1, "train.py", cfg, "exp_name=two", "batch_size=1", f"accumulate={accumulate}", *MORE)
    assert f"2 processes before, 1 now: a step takes {accumulate} photos from here on" in output


def test_two_processes_evaluate_to_exactly_the_scores_of_one(config_file):
    cfg, results = config_file(exp_name="scored", n_epochs=1), []
    computed(1, "train.py", cfg)
    place = folder(cfg, "scored") / "evaluation" / "last-limit3"
    for processes in (1, 2):  # an odd number of photos: the processes have unequal shares
        options = ("--checkpoint", "last", "--limit", 3, "--decode", "all")
        assert computed(processes, "evaluate.py", cfg, *options).count("pixel accuracy") == 1
        record = json.loads((place / "scores.json").read_text())
        assert len(list((place / "pictures" / "overlay").iterdir())) == record["photos"] == 3
        maps = {script.name: script.read_text() for script in (place / "pictures" / "report").glob("*.js")}
        with np.load(place / "photos.npz") as per_photo:
            counts = {key: per_photo[key].tolist() for key in per_photo}
        results.append((record["scores"], record["levels"], record["rules"], maps, counts))
    assert results[0] == results[1]


def test_a_loss_that_is_not_finite_names_the_photos_of_all_processes(config_file, sample_data):
    cfg = config_file(exp_name="wild", lr=100, batch_size=1, n_epochs=50)
    output = computed(2, "train.py", cfg, status=2)
    ids = re.search(r"is not finite\. Photos: (\S+), (\S+)\. The checkpoints are", output).groups()
    assert len(set(ids)) == 2
    assert set(ids) <= set((sample_data / "train_id.txt").read_text().split())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_hanging_process_ends_the_run_and_it_resumes(config_file, number):
    cfg = config_file(exp_name="hurt", n_epochs=500, batch_size=1, num_workers=1, timeout_minutes=0.05)
    told, hurt = started(2, "train.py", cfg)
    told.wait_for("epoch 1/500")
    os.kill(hurt.process.pid, number)
    assert "a process of this run is gone or hangs" in ended([told], 2)
    hurt.process.kill()
    children = started(2, "train.py", cfg, "--resume")
    children[0].wait_for("experiment 'hurt'")
    for child in children:  # as torchrun does, which passes the signal on to all
        os.kill(child.process.pid, signal.SIGTERM)
    output = ended(children, 128 + signal.SIGTERM)
    assert (output.count("resumed from"), output.count("stopped by SIGTERM")) == (1, 1), output


def test_with_torchrun_a_fault_ends_all_and_is_told_once_at_the_end_of_its_report(config_file, sample_data, tmp_path):
    shutil.copytree(sample_data, tmp_path / "data")
    damaged = (sample_data / "train_id.txt").read_text().split()[0]
    next((tmp_path / "data" / "JPEGImages").glob(f"{damaged}.*")).write_bytes(b"not a photo")
    cfg = config_file(exp_name="faulty", batch_size=3, root_data_dir="data")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, REPO / "train.py", "--cfg", cfg]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode != 0
    *_, last, ruler = done.stdout.strip().splitlines()
    assert last.startswith("  error: "), done.stdout
    assert damaged in last
    assert set(ruler) == {"="}
    assert done.stdout.count("error: ") == 1, done.stdout
