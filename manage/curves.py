"""Curves of a training: TensorBoard, and one line of JSON an epoch in metrics.jsonl."""

import json
import os
import sys
from collections.abc import Sequence

import numpy
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as summarise_hparams

from configs.config import Config, differences
from utils.files import write_whole

LINES = "metrics.jsonl"
LAYOUT = {"training": {"loss": ["Multiline", ["loss_train", "loss_val"]], "mIoU": ["Multiline", [r"^mIoU\d+$"]]}}
FIRST = ("criterion", "decode", "encoder", "lr", "seed")
_PLACES = {"exp_name", "root_dir", "root_data_dir", "device", "num_workers"}  # say nothing there


class Curves:
    """Writes curves; without a config it takes everything and writes nothing.

    A resume at `step`, after `epoch` epochs, hides what an earlier process drew beyond. A full or vanished disk
    silences the curves with a line; it does not end a training.
    """

    def __init__(self, config: Config | None = None, step: int = 0, epoch: int = 0) -> None:
        self.writer, self.is_silent = None, False
        if config is not None:
            self.lines = config.experiment_dir / LINES
            self._cut_lines(epoch)
            self.writer = SummaryWriter(str(config.tensorboard_dir), purge_step=step + 1)
            self._try(lambda: self.writer.add_custom_scalars(LAYOUT))

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._try(lambda: [self.writer.add_scalar(name, value, step) for name, value in values.items()])

    def picture(self, name: str, image: numpy.ndarray, step: int) -> None:
        """Shape: image (H, W, 3) uint8."""
        self._try(lambda: self.writer.add_image(name, image, step, dataformats="HWC"))

    def hparams(self, config: Config, curves: Sequence[str]) -> None:
        """What tells runs apart against the last value of these curves, in TensorBoard's HParams tab."""
        plain = {k: v if type(v) in (int, float, str) else str(v) for k, v in what_tells_apart(config).items()}
        for summary in summarise_hparams(plain, dict.fromkeys(curves, 0.0)):
            self._try(lambda summary=summary: self.writer.file_writer.add_summary(summary))

    def line(self, record: dict) -> None:
        """One line of metrics.jsonl."""
        self._try(lambda: self._append(json.dumps(record) + "\n"))

    def flush(self) -> None:
        """Before a checkpoint: what it stands for must not be lost after it."""
        self._try(lambda: self.writer.flush())

    def close(self) -> None:
        self._try(lambda: self.writer.close())

    def _append(self, line: str) -> None:
        """Adds the whole line or nothing."""
        with open(self.lines, "a", encoding="utf-8") as file:
            before = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.lines, before)
                raise

    def _cut_lines(self, epoch: int) -> None:
        """Leaves the lines of the first epochs. Raises: OSError."""
        if self.lines.is_file():
            lines = self.lines.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _epoch_of(line) <= epoch]
            if kept != lines:
                write_whole("".join(kept), self.lines)

    def _try(self, action) -> None:
        if self.writer is None:
            return
        try:
            action()
        except OSError as error:
            if not self.is_silent:
                print(f"warning: curves cannot be written ({error}); training goes on without them", file=sys.stderr)
            self.is_silent = True


def what_tells_apart(config: Config) -> dict:
    """What the table of HParams shows of a config: five keys always, and those that differ from the defaults.

    TensorBoard sorts by name and shows five columns at first, so these five begin with a space.
    """
    values, changed = config.to_dict(), differences(config, Config())
    others = {key: values[key] for key in changed if key not in _PLACES and key not in FIRST}
    return {f" {key}": values[key] for key in FIRST} | others


def _epoch_of(line: str) -> float:
    """Beyond all where the line is torn."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
