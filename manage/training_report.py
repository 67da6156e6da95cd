"""What a training says and draws: its plan, a line an epoch, curves and pictures, and its last line."""

import signal
import sys
import time

import torch
from tqdm import tqdm

from configs.config import Config
from manage import distributed
from manage.curves import Curves
from manage.evaluation_manager import Validation
from manage.experiment import command
from manage.inference import chosen_amp
from manage.training_state import peak_memory
from utils.cli import duration, progress
from utils.hierarchy import Hierarchy


def say(text: str) -> None:
    """A line on screen, from one process."""
    if distributed.is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def bar(total: int, initial: int, name: str) -> tqdm:
    return progress(total=total, initial=initial, desc=name, leave=False, disable=not distributed.is_main())


class TrainingReport:
    """Says and draws for one training; scores are in percent on screen and in TensorBoard."""

    def __init__(self, config: Config, hierarchy: Hierarchy, device: torch.device) -> None:
        self.config, self.hierarchy, self.device = config, hierarchy, device
        self.curves, self.is_warned = Curves(), False
        self.start_clock(0.0)

    def start_clock(self, epochs_done: float) -> None:
        self.began, self.begun_at = time.monotonic(), epochs_done

    def plan(self, photos: tuple[int, int], batch_size: int, steps: int, warmup_epochs: float) -> None:
        config, world = self.config, distributed.world()
        if batch_size < config.batch_size:
            say(f"batch_size {config.batch_size} is more than the photos for one step; {batch_size} is used")
        if warmup_epochs < config.warmup_epochs:
            say(f"warmup_epochs {config.warmup_epochs:g} fills the run; {warmup_epochs:g} is used")
        amp = chosen_amp(self.device, config.amp)
        say(
            f"experiment {config.exp_name!r}: {photos[0]} train and {photos[1]} val photos, {config.n_epochs} epochs "
            f"of {steps} steps of {batch_size * config.accumulate * world} photos ({batch_size} x {config.accumulate} "
            f"accumulated x {world} processes) on {self.device}" + (f" in {amp}" if amp != "off" else "")
        )
        if config.compile:
            say("compiling takes a minute or two before the first step")

    def epoch(self, record: dict, result: Validation | None) -> None:
        """One epoch: its curves, its line of metrics.jsonl, its line on screen."""
        number = record["epoch"]
        if result is not None:
            self._draw(result, number)
        curves = self._epoch_curves(record)
        self.curves.scalars(curves, number)
        self.curves.line(record)
        scores = [_score(name.removeprefix("val/"), value) for name, value in curves.items() if "train/" not in name]
        left = self.config.n_epochs - number
        seconds = (time.monotonic() - self.began) / max(1e-9, number - self.begun_at) * left
        end = [f"{record['photos_per_second']:.1f} photos/s", *[f"{duration(seconds)} left"] * bool(left)]
        say("  ".join([f"epoch {number}/{self.config.n_epochs}", *scores, *end]))
        if not left:
            self.curves.hparams(self.config, [name for name in curves if "/" not in name])

    def end(self, best: float | None, epoch: int | None) -> None:
        config = self.config
        name, score = config.monitor.split()[1], "no best checkpoint"
        if best is not None and epoch is not None:
            score = f"best in epoch {epoch}: {_score(name, best if name.startswith('loss') else 100 * best)}"
        scoring = command("evaluate.py", config, "--checkpoint", "last" if best is None else "best")
        say(f"done, {score}; all is in {config.experiment_dir}. Score it: {scoring}")

    def farewell(self, number: int, step: int, is_saved: bool) -> None:
        name = signal.Signals(number).name
        if is_saved:
            resume = command("train.py", self.config, "--resume")
            say(f"stopped by {name} after step {step}; all is saved. Go on with: {resume}")
        else:
            say(f"stopped by {name}; the newest checkpoint could not be written, the one before stands")

    def _epoch_curves(self, record: dict) -> dict[str, float]:
        """Losses, and the wanted scores in percent."""
        curves = {}
        for key, value in record.items():
            if not isinstance(value, int | float):
                continue
            metric = "mIoU_with_background" if key.endswith("_with_background") else key.rstrip("0123456789")
            if key in ("loss_train", "loss_val"):
                curves[key] = value
            elif metric in self.config.metrics:
                curves[key if "mIoU" in metric else f"val/{key}"] = 100 * value
        curves["train/photos_per_second"] = record["photos_per_second"]
        curves["train/memory_GiB"] = peak_memory(self.device) / 2**30
        return curves

    def _draw(self, result: Validation, epoch: int) -> None:
        for name, picture in result.pictures.items():
            self.curves.picture(f"val_pictures/{name}", picture, epoch)
        per_class = {f"val_IoU_level{lv}/{name}": 100 * v for lv, name, v in result.per_class if v is not None}
        self.curves.scalars(per_class, epoch)
        for level, (name, picture) in enumerate(result.confusion_pictures.items(), start=1):
            self.curves.picture(f"val_confusion/level{level}_{name}", picture, epoch)
        background = {self.hierarchy.names[v] for v in self.hierarchy.background}
        parts = [value for level, name, value in result.per_class if level == 1 and name not in background]
        if background and not any(parts) and not (self.is_warned and epoch < self.config.n_epochs):
            self.is_warned = True
            say(
                "warning: not one pixel of a part is found, all is background. Usual causes: too few steps so far; lr "
                "too high or too low (sgd 0.01, adam and adamw 0.001); masks of another class order (look at "
                "val_pictures in TensorBoard)"
            )


def _score(name: str, value: float) -> str:
    return f"{name} {value:.4f}" if name.startswith("loss") else f"{name} {value:.1f} %"
