"""What a training says and draws: its plan, a line an epoch, TensorBoard, metrics.jsonl, and its last line."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as summarise_hparams
from tqdm import tqdm

from configs.config import Config, differences
from manage import distributed
from manage.evaluation_manager import Validation
from manage.experiment import command
from manage.inference import chosen_amp
from utils.cli import duration, progress
from utils.errors import UserError
from utils.files import write_whole
from utils.hierarchy import Hierarchy

LAYOUT = {"training": {"loss": ["Multiline", ["loss_train", "loss_val"]], "mIoU": ["Multiline", [r"^mIoU\d+$"]]}}
FIRST = ("criterion", "decode", "encoder", "lr", "seed")  # in the table of HParams
PLACES = ("exp_name", "root_dir", "root_data_dir", "device", "num_workers")  # say nothing there


def say(text: str) -> None:
    """A line on screen, from one process."""
    if distributed.is_main():
        with contextlib.suppress(OSError):  # a full disk, or a reader that went away, ends no training
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def bar(total: int, initial: int, name: str) -> tqdm:
    return progress(total=total, initial=initial, desc=name, leave=False, disable=not distributed.is_main())


class TrainingReport:
    """Says and draws for one training; scores are in percent on screen and in TensorBoard.

    It writes nothing where it is not opened. A full or vanished disk silences the curves with a line; it does not end
    a training.
    """

    def __init__(self, config: Config, hierarchy: Hierarchy, device: torch.device) -> None:
        self.config, self.hierarchy, self.device = config, hierarchy, device
        self.writer, self.is_silent = None, False
        self.file, self.lines = config.experiment_dir / "metrics.jsonl", []

    def open(self, step: int, epoch: int) -> None:
        """Goes on after a step and an epoch; hides what an earlier process drew beyond. Raises: OSError."""
        if self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            try:
                self.lines = [line for line in lines if json.loads(line)["epoch"] <= epoch]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.file}: a line is no record of an epoch; mend it, or move it away") from None
        self.writer = SummaryWriter(str(self.config.tensorboard_dir), purge_step=step + 1)
        self._draw(lambda writer: writer.add_custom_scalars(LAYOUT))

    def flush(self) -> None:
        """Before a checkpoint: what it stands for must not be lost after it."""
        self._draw(lambda writer: writer.flush())

    def close(self) -> None:
        self._draw(lambda writer: writer.close())

    def _draw(self, how: Callable[[SummaryWriter], object]) -> None:
        try:
            if self.writer is not None:
                how(self.writer)
        except OSError as error:
            if not self.is_silent:
                print(f"warning: curves cannot be written ({error}); training goes on without them", file=sys.stderr)
            self.is_silent = True

    def plan(self, photos: tuple[int, int], batch_size: int, steps: int, warmup_epochs: float, done: float) -> None:
        """What will be done, and what of the config is cut; from here the time runs, after `done` epochs."""
        self.began, self.begun_at = time.monotonic(), done
        config, world = self.config, distributed.world()
        used = {"batch_size": batch_size, "warmup_epochs": warmup_epochs}
        used |= {key: min(getattr(config, key), config.n_epochs) for key in ("val_every", "save_epoch")}
        for key, value in used.items():
            if value < getattr(config, key):
                say(f"{key} {getattr(config, key):g} is more than this run has room for; {value:g} is used")
        amp = chosen_amp(self.device, config.amp)
        say(
            f"experiment {config.exp_name!r}: {photos[0]} train and {photos[1]} val photos, {config.n_epochs} epochs "
            f"of {steps} steps of {batch_size * config.accumulate * world} photos ({batch_size} x {config.accumulate} "
            f"accumulated x {world} processes) on {self.device}" + (f" in {amp}" if amp != "off" else "")
        )
        if config.compile:
            say("compiling takes a minute or two before the first step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._draw(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])

    def epoch(self, record: dict, result: Validation | None) -> None:
        """One epoch: its curves, its line of metrics.jsonl, its line on screen."""
        number, left = record["epoch"], self.config.n_epochs - record["epoch"]
        wanted = {key: value for key, value in record.items() if self._is_wanted(key) and value is not None}
        curves = {key: value if key.startswith("loss") else 100 * value for key, value in wanted.items()}
        self.scalars({key if key.startswith(("loss", "mIoU")) else f"val/{key}": curves[key] for key in curves}, number)
        self.lines.append(json.dumps(record))
        self._draw(lambda _: write_whole("\n".join(self.lines) + "\n", self.file))
        if not left:
            summaries = summarise_hparams(what_tells_apart(self.config), dict.fromkeys(curves, 0.0))
            self._draw(lambda writer: [writer.file_writer.add_summary(summary) for summary in summaries])
        seconds = (time.monotonic() - self.began) / max(1e-9, number - self.begun_at) * left
        end = [f"{record['photos_per_second']:.1f} photos/s", *[f"{duration(seconds)} left"] * bool(left)]
        scores = [_score(name, value) for name, value in curves.items()]
        say("  ".join([f"epoch {number}/{self.config.n_epochs}", *scores, *end]))
        if result is not None:
            self._show(result, number)

    def _is_wanted(self, key: str) -> bool:
        """Losses, and the wanted scores at every level."""
        metric = "mIoU_with_background" if key.endswith("_with_background") else key.rstrip("0123456789")
        return key in ("loss_train", "loss_val") or metric in self.config.metrics

    def _show(self, result: Validation, epoch: int) -> None:
        """Pictures and the score of each class, and a warning where no part is found at all."""
        pictures = {f"val_pictures/{name}": picture for name, picture in result.pictures.items()}
        self._draw(lambda writer: [writer.add_image(*item, epoch, dataformats="HWC") for item in pictures.items()])
        self.scalars({f"val_IoU_level{lv}/{n}": 100 * v for lv, n, v in result.per_class if v is not None}, epoch)
        background = {self.hierarchy.names[v] for v in self.hierarchy.background}
        parts = [value for level, name, value in result.per_class if level == 1 and name not in background]
        if background and not any(parts):
            say(
                "warning: not one pixel of a part is found, all is background. Usual causes: too few steps so far; lr "
                "too high or too low (sgd 0.01, adam and adamw 0.001); masks of another class order (look at "
                "val_pictures in TensorBoard)"
            )

    def end(self, best: float | None, epoch: int | None) -> None:
        config = self.config
        name, score = config.monitor.split()[1], "no best checkpoint"
        if best is not None and epoch is not None:
            score = f"best in epoch {epoch}: {_score(name, best if name.startswith('loss') else 100 * best)}"
        scoring = command("evaluate.py", config, "--checkpoint", "last" if best is None else "best")
        say(f"done, {score}; all is in {config.experiment_dir}. Score it: {scoring}")

    def farewell(self, number: int, step: int, is_saved: bool) -> None:
        going_on = f"all is saved; go on with: {command('train.py', self.config, '--resume')}"
        end = going_on if is_saved else "nothing could be saved since the last save"
        say(f"stopped by {signal.Signals(number).name} after step {step}; {end}")


def what_tells_apart(config: Config) -> dict:
    """What the table of HParams shows of a config: five keys always, and those that differ from the defaults.

    TensorBoard sorts by name and shows five columns at first, so these five begin with a space.
    """
    values = {key: ours for key, (ours, _) in differences(config, Config()).items() if key not in PLACES}
    values |= {f" {key}": values.pop(key, getattr(config, key)) for key in FIRST}
    return {key: value if type(value) in (int, float, str) else str(value) for key, value in values.items()}


def _score(name: str, value: float) -> str:
    return f"{name} {value:.4f}" if name.startswith("loss") else f"{name} {value:.1f} %"
