"""Tiny data sets and trainings, and child processes that run them and can be killed.

Children come from a fork server that has imported torch already: a start costs a tenth of a second, not four.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import evaluate
import manage.train_manager
import models.hseg
import train as train_script
from utils.cli import run_main
from utils.encoder import Encoder
from utils.hierarchy import Hierarchy

MAINS = {"train.py": train_script.main, "evaluate.py": evaluate.main}
REPO = Path(__file__).resolve().parents[1]
TREE = REPO / "configs" / "hierarchies" / "pascal_part.json"
BODY, VOID = 6, 255  # the largest leaf id, and ignore_index

TINY = {"exp_name": "tiny", "num_workers": 0, "device": "cpu", "log_every": 1, "save_epoch": 1, "keep": 2}
TINY |= {"encoder": "resnet18", "pretrained": False, "decoder_channels": [8, 8, 8, 8, 8]}
TINY |= {"criterion": "tree_min", "crop_size": 32, "batch_size": 2, "n_epochs": 3}


def make_data(folder: Path, train: int = 8, val: int = 3, seed: int = 0) -> Path:
    """Photos of noise over blocks of labels, and their encoding."""
    generator = np.random.default_rng(seed)
    for name in ("JPEGImages", "gt_masks"):
        (folder / name).mkdir(parents=True)
    names = [f"p{i:02}" for i in range(train + val)]
    for name in names:
        height, width = generator.integers(36, 52, 2)
        labels = generator.integers(0, BODY + 1, (height // 8 + 1, width // 8 + 1)).astype(np.uint8)
        labels = labels.repeat(8, 0).repeat(8, 1)[:height, :width].copy()
        labels[:2] = VOID
        photo = 30 * labels[..., None].clip(0, 7) + generator.integers(0, 40, (height, width, 3))
        Image.fromarray(photo.astype(np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        Image.fromarray(labels).save(folder / "gt_masks" / f"{name}.png")
    (folder / "train_id.txt").write_text("\n".join(names[:train]) + "\n")
    (folder / "val_id.txt").write_text("\n".join(names[train:]) + "\n")
    Encoder(folder / "gt_masks", folder / "JPEGImages", folder / "gt_masks_hie", Hierarchy.load(TREE)).run()
    return folder


def write_config(root: Path, data: Path, **keys) -> Path:
    """A config file in `root`, whose experiments lie in `root`, too."""
    values = TINY | {"root_dir": str(root), "root_data_dir": str(data)} | keys
    path = root / f"{values['exp_name']}.json"
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def records(root: Path, name: str = "tiny") -> list[dict]:
    """The lines of metrics.jsonl without what a clock decides."""
    lines = (root / "experiments" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "photos_per_second"} for line in lines]


def curves(root: Path, name: str = "tiny") -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of the points that TensorBoard shows; what was drawn twice is the same both times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "tensorboard" / name), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {tag: sorted(set(values)) if tag not in ("loss", "lr") else values for tag, values in points.items()}


class SlimEncoder(nn.Module):
    """Five strided convolutions in a ResNet's place: a step takes milliseconds, a checkpoint 200 kB."""

    channels = dict.fromkeys((2, 4, 8, 16, 32), 8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, _name: str) -> None:
        super().__init__()
        stages = [nn.Sequential(nn.Conv2d(n, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()) for n in (3, 8, 8, 8, 8)]
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [images]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]


# --- children ---
class Child:
    """One run of train.py or evaluate.py in a process of its own, with a slim network unless `real`.

    `prepare` holds functions and their arguments, called there first (see tests/kill.py); what was printed is `output`.
    """

    def __init__(self, script: str, *arguments, log: Path, real: bool = False, prepare: list[tuple] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.factory"])
        self.log = log
        log.write_text("")
        self.process = context.Process(target=_run, args=([script, *map(str, arguments)], str(log), real, prepare))
        self.process.start()

    def wait(self, seconds: float = 240) -> int:
        """The exit status, negative for a signal."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        return self.process.exitcode

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Until `text` has been printed."""
        end = time.monotonic() + seconds
        while text not in self.output:
            if not self.process.is_alive() or time.monotonic() > end:
                raise TimeoutError(f"{text!r} was not printed:\n{self.output}")
            time.sleep(0.02)

    @property
    def output(self) -> str:
        return self.log.read_text()


def train(root: Path, data: Path, *arguments, status: int = 0, real: bool = False, prepare: list[tuple] = (), **keys):
    """What one run of train.py printed, with some keys of the config; it ends with that status."""
    cfg = write_config(root, data, **keys)
    child = Child("train.py", "--cfg", cfg, *arguments, log=root / "log", real=real, prepare=prepare)
    assert child.wait() == status, child.output
    return child.output


def save_each_step() -> None:
    """Prepares a child to write last.pt after every step."""
    manage.train_manager.SAVE_EVERY_S = 0


def _run(command: list[str], log: str, real: bool, prepare: list[tuple]) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = command
    torch.set_num_threads(1)
    try:
        if not real:
            models.hseg.build_encoder = SlimEncoder
        for function, *details in prepare:
            function(*details)
        run_main(MAINS[command[0]])
    except Exception:
        traceback.print_exc()
        os._exit(1)
