"""Training: what happens in which order, from the first check to the last checkpoint."""

import hashlib
import itertools
import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from configs.config import Config
from manage import distributed, experiment
from manage.checkpoint import DamagedCheckpoint, find_checkpoint, keep_newest, load_checkpoint, newest_valid, pack
from manage.data import Tolerance, TrainLoader, ValLoader, check_data, read_split
from manage.evaluation_manager import Validation, validate
from manage.inference import NotFinite
from manage.learner import Learner, Step, seed_everything
from manage.network import load_hierarchy
from manage.predictor import Decoding
from manage.training_report import TrainingReport, bar, say
from utils.dataset import Sample, keep_photos
from utils.errors import UserError
from utils.files import write_whole
from utils.locks import Lock
from utils.schedules import lr_factor

SAVE_EVERY_S = 600  # last.pt, inside an epoch
LATE_STEPS = 4  # so many steps later the numbers of a step are read: nothing waits for the device
STOPS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]  # save, and end
ADVICE = "The checkpoints are from before it. Lower lr, or set grad_clip (such as 1.0), under a new exp_name"
PROGRESS = ("epoch", "batch", "step", "loss_sum", "best", "best_epoch")  # kept in checkpoints


class Interrupted(Exception):
    """A signal of this number came; raised between two steps, where the state is whole."""


class TrainManager:
    """One training run. The constructor reads and builds; `run` opens the experiment and trains to the last epoch.

    Raises: UserError before the first step for whatever a user can get wrong.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device, self.world = distributed.choose_device(config.device), distributed.world()
        self.hierarchy = load_hierarchy(config)
        Decoding.of(config).biases(self.hierarchy)  # which can refuse them
        self.encoding = check_data(config, self.hierarchy)
        seed_everything(config)
        self.loader = TrainLoader(config, self.hierarchy, self.device)
        self.batches = self.loader.batches
        self.train_ids, self.val_ids = read_split(config, "train"), read_split(config, "val")
        self.val_loader = ValLoader(config, self.hierarchy, self.val_ids, self.device)
        splits = {"train": self.loader.photos, "val": self.val_loader.photos}
        self.kept_photos = keep_photos(splits, config.cache, self.device)
        self.steps_per_epoch = self.batches.n_batches // config.accumulate
        self.warmup_epochs = config.warmup_epochs if config.warmup_epochs < config.n_epochs else config.n_epochs / 2
        self.learner = Learner(config, self.hierarchy, self.encoding.pixels, self.device)
        self.loader.views.show_outside(self.learner.network.input_mean)
        self.epoch, self.batch, self.step = 0, 0, 0  # the next batch to train on, and optimiser steps done
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of this epoch
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.tolerance = Tolerance(config.skip_unreadable, self.train_ids)
        self.val_tolerance = Tolerance(config.skip_unreadable, self.val_ids)
        self.late, self.newest_loss = deque[Step](), "-"  # steps on their way from the device; as it is shown
        self.is_whole = True  # between two steps, all of them finite as far as is known
        self.signal: int | None = None  # what this process was told
        self.lock, self.report = Lock(config.experiment_dir), TrainingReport(config, self.hierarchy, self.device)
        self.records = (config, self.hierarchy, self.device, self.world)

    # --- opening ---
    def run(self, resume: str | None = None, overwrite: bool = False, take_over: bool = False) -> int:
        """Trains to the last epoch; returns the exit status (128 + the signal's number when interrupted).

        `resume`: None starts; "" goes on from the newest checkpoint, "auto" too where there is an experiment; a path
        starts a new experiment from that file.
        """
        config, handlers = self.config, {}
        try:
            self._open(resume, overwrite, take_over)
            if self.epoch >= config.n_epochs:
                if not (config.checkpoints_dir / "last.pt").is_file():  # it was killed on the way to it
                    self.save("last")
                say(f"experiment {config.exp_name!r} is finished ({config.n_epochs} epochs); n_epochs may grow")
                return 0
            # nohup's wish not to hear SIGHUP is respected
            heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
            handlers = {number: signal.signal(number, self._on_signal) for number in heard}
            distributed.largest(0)  # all processes listen to signals before the first is told that the run goes on
            say(self.kept_photos)
            photos, done = (len(self.train_ids), len(self.val_ids)), self.epoch + self.batch / self.batches.n_batches
            self.report.plan(photos, self.batches.batch_size, self.steps_per_epoch, self.warmup_epochs, done)
            return self._train()
        finally:
            self.report.close()
            self.lock.release()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _open(self, resume: str | None, overwrite: bool, take_over: bool) -> None:
        """The experiment's folder: a new one, or the one to resume; and the state to start from."""
        config, source = self.config, None
        if resume == "auto":
            resume = "" if distributed.on_main_only(config.copy_file.is_file) else None
        is_new = resume != ""
        if not is_new:
            distributed.on_main_only(experiment.open_experiment, config, self.lock, take_over)
            source = distributed.on_main_only(newest_valid, config.checkpoints_dir, say)
        elif resume is not None:
            source = find_checkpoint(resume, config.checkpoints_dir, config.root)
        if source is None:
            self.learner.start()
        else:
            self._go_on_from(source)
        if is_new:
            distributed.on_main_only(experiment.create_experiment, config, self.lock, overwrite, take_over)
        if not (config.checkpoints_dir / "best.pt").is_file():
            self.best = None  # none is better than what is on disk
        if is_new and source and not self.save("last"):  # first: a folder with a config is resumed from what it holds
            raise UserError(f"{config.checkpoints_dir}: the state taken over could not be written; free space")
        distributed.on_main_only(experiment.write_records, *self.records)
        distributed.on_main_only(self.report.open, self.step, self.epoch)

    def _go_on_from(self, file: Path) -> None:
        """Takes over a checkpoint's state.

        Raises: UserError where it is damaged, or of another config, tree, network or list of photos.
        """
        state, source, photos = load_checkpoint(file), str(file), self.world * self.batches.batch_size
        experiment.check_same_run(self.config, self.hierarchy, state, source, self._lists())
        try:
            self.load_state(state, source)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            advice = f"use another one, or start anew from its weights: init_from={source}"
            raise DamagedCheckpoint(f"{source}: its state cannot be taken over ({reason}); {advice}") from None
        if state["world"] != self.world:
            steps = f"a step takes {photos * self.config.accumulate} photos from here on"
            say(f"{state['world']} processes before, {self.world} now: {steps}")
        say(f"resumed from {source} at epoch {self.epoch + 1}, batch {self.batch + 1}")

    # --- running ---
    def _train(self) -> int:
        try:
            while self.epoch < self.config.n_epochs:
                self._train_epoch()
                self._finish_epoch()
        except Interrupted as stop:
            self.report.farewell(stop.args[0], self.step, is_saved=bool(self.save("last")))
            return 128 + stop.args[0]
        except NotFinite as error:  # in validation: the weights are spoilt, and must not be saved
            raise UserError(f"{error}. {ADVICE}") from None
        except Exception as error:
            if distributed.means_lost_process(error):
                raise
            raise UserError(self._last_words(error)) from error
        self.tolerance.report()
        self.val_tolerance.report()
        self.report.end(self.best, self.best_epoch)
        return 0

    def _train_epoch(self) -> None:
        self.batches.start_at(self.epoch, self.batch)
        torch.backends.cudnn.benchmark = not self.config.deterministic  # all crops have one size
        self.learner.set_train_mode(self._is_frozen())
        saved = began = time.monotonic()
        first = self.batch
        with bar(self.batches.n_batches, self.batch, f"epoch {self.epoch + 1}/{self.config.n_epochs}") as shown:
            for group in self._groups():
                self.is_whole = False
                self.train_step(group)
                self.batch += len(group)
                self.step += 1
                self.is_whole = True
                self._read_steps()
                shown.set_postfix(loss=self.newest_loss, refresh=False)
                shown.update(len(group))
                if self._stop_if_asked(wants_save=time.monotonic() - saved > SAVE_EVERY_S):
                    self.save("last")
                    saved = time.monotonic()
        self._read_steps(late=0)
        photos = (self.batch - first) * self.batches.batch_size * self.world
        self.photos_per_second = photos / max(1e-9, time.monotonic() - began)

    def _groups(self) -> Iterator[list[Sample]]:
        """The batches of each optimiser step."""
        batches = iter(self.loader)
        while group := list(itertools.islice(batches, self.config.accumulate)):
            for batch in group:
                for index, fault in zip(batch.index.tolist(), batch.fault, strict=True):
                    self.tolerance.check(index, fault)
            yield group

    def train_step(self, group: list[Sample]) -> Tensor:
        """One optimiser step; returns its mean loss over the known pixels of all processes."""
        lr = self._lr()
        values = self.learner.step(group, lr, self._is_frozen())
        self.loss_sum += values[0]
        self.late.append(Step(self.step + 1, lr, [batch.index for batch in group], values))
        return values[0]

    def _read_steps(self, late: int = LATE_STEPS) -> None:
        """Draws the steps whose numbers are there. Raises: UserError at one that is not finite."""
        while len(self.late) > late:
            step = self.late.popleft()
            loss, norm, is_finite = step.read()
            if not is_finite:  # for all processes, of which each names its photos
                self.is_whole = False
                ids = [self.train_ids[index] for part in step.photos for index in part.tolist()]
                photos = ", ".join(sample_id for part in distributed.gather(ids) for sample_id in part)
                raise UserError(
                    f"step {step.number} (epoch {(step.number - 1) // self.steps_per_epoch + 1}): loss {loss:g}, "
                    f"gradient norm {norm:g} is not finite. Photos: {photos}. {ADVICE}"
                )
            self.newest_loss = f"{loss:.3f}"
            if step.number % self.config.log_every == 0:
                self.report.scalars({"loss": loss, "lr": step.lr}, step.number)

    def _finish_epoch(self) -> None:
        """Validates, draws the curves, and saves."""
        config, number, result = self.config, self.epoch + 1, None
        is_last = number == config.n_epochs
        record = {"epoch": number, "step": self.step, "lr": self.learner.optimizer.param_groups[0]["lr"]}
        record["loss_train"] = float(self.loss_sum) / self.steps_per_epoch
        record["photos_per_second"] = self.photos_per_second
        if is_last or number % config.val_every == 0:
            result = self._validate()
            record |= result.scores
        self.report.epoch(record, result)
        score, before = record.get(config.monitor.split()[1]), (self.best, self.best_epoch)
        if is_best := self._is_best(score):
            self.best, self.best_epoch = score, number
        self.epoch, self.batch = number, 0
        self.loss_sum.zero_()
        is_kept = is_last or number % config.save_epoch == 0
        written = self.save(*["best"] * is_best, *[f"checkpoint_{number}"] * is_kept, "last")
        if is_best and "best" not in written:
            self.best, self.best_epoch = before  # the next one that is better than what is on disk is the best
        if is_last and "last" not in written:
            raise UserError(f"the last checkpoint was not written in {config.checkpoints_dir}; free space, --resume")
        self._stop_if_asked()

    def _validate(self) -> Validation:
        network = self.learner.scored
        distributed.copy_from_main(network.buffers())  # each process has counted its own BatchNorm statistics
        torch.backends.cudnn.benchmark = False  # photos differ in size
        shown = bar(len(self.val_loader), 0, "validation")
        parts = (self.hierarchy, self.config, self.learner.criterion, self.val_tolerance)
        return validate(network, self.val_loader, *parts, shown, between=self._stop_if_asked)

    def _is_best(self, score: float | None) -> bool:
        if score is None or not math.isfinite(score):
            return False
        return self.best is None or (score > self.best if self.config.monitor[:3] == "max" else score < self.best)

    def _lr(self) -> float:
        config, steps = self.config, self.steps_per_epoch
        warmup, total = self.warmup_epochs * steps, config.n_epochs * steps
        return config.lr * lr_factor(config.schedule, self.step, total, warmup)

    def _is_frozen(self) -> bool:
        return self.epoch < self.config.freeze_encoder_epochs

    # --- saving ---
    def save(self, *names: str) -> list[str]:
        """Writes one state under each name; returns those that the disk took, and says so when it is not all.

        `last` comes last: where it stands, the others of its moment do too, and a resume misses none of them.
        Raises: UserError when a step up to here was not finite.
        """
        self._read_steps(late=0)
        self.report.flush()
        if not distributed.is_main():
            return list(names)
        folder, written = self.config.checkpoints_dir, []
        try:
            if not folder.is_dir():
                say(f"warning: {folder} has vanished; it is made anew")
                experiment.write_records(*self.records)
            data = pack(self.state())
            for name in names:
                write_whole(data, folder / f"{name}.pt", folder / "previous.pt" if name == "last" else None)
                written.append(name)
            keep_newest(folder, self.config.keep)
        except OSError as error:
            say(f"warning: no checkpoint could be written in {folder} ({error.strerror}); the older ones stand")
        return written

    def state(self) -> dict:
        """All that evaluation, prediction and an exact resume need; plain values and tensors."""
        return {
            **self.learner.state(),
            **{key: getattr(self, key) for key in PROGRESS},
            "faults": [self.tolerance.faults, self.val_tolerance.faults],
            "world": self.world,
            "config": self.config.to_dict(),
            "tree": self.hierarchy.to_dict(),
            **self._lists(),
        }

    def load_state(self, state: dict, source: str) -> None:
        """Takes over what `state` gave. Raises: UserError, and many kinds of errors for a state that is no such."""
        if not all(type(state[key]) is int for key in ("epoch", "batch", "step", "world")):
            raise DamagedCheckpoint(f"{source}: holds no whole numbers of epoch and step; use another checkpoint")
        self.learner.load_state(state, source)
        for key in PROGRESS:
            setattr(self, key, state[key])
        self.loss_sum = self.loss_sum.to(self.device, torch.float64)
        if state["world"] != self.world:  # batches are counted in another unit: begin that epoch at a whole step
            done = self.batch * state["world"] // self.world
            self.batch = min(done // self.config.accumulate * self.config.accumulate, self.batches.n_batches)
            self.step = self.epoch * self.steps_per_epoch + self.batch // self.config.accumulate
            self.loss_sum *= state["world"] / self.world
        self.tolerance.faults, self.val_tolerance.faults = map(dict, state["faults"])

    def _lists(self) -> dict[str, str]:
        """What tells whether the lists of photos, and the classes in them, are still the same."""
        lists = {"train_ids": self.train_ids, "val_ids": self.val_ids}
        lists["labels"] = [str(self.encoding.files.get(i, {}).get("counts")) for i in self.train_ids + self.val_ids]
        return {key: hashlib.sha256("\n".join(lines).encode()).hexdigest() for key, lines in lists.items()}

    # --- ends before the last epoch ---
    def _last_words(self, error: Exception) -> str:
        """What ended the run, once what is whole has been saved."""
        text = distributed.one_line(error, self.config, f"step {self.step + 1} (epoch {self.epoch + 1})")
        if self.world > 1 or not self.is_whole or self.epoch >= self.config.n_epochs:
            return text
        try:
            saved = self.save("last")
        except UserError as worse:
            return str(worse)
        going_on = experiment.command("train.py", self.config, "--resume")
        return f"{text}. All steps before it are saved; go on with: {going_on}" if saved else text

    def _on_signal(self, number: int, _frame) -> None:
        if self.signal is not None:  # the second one ends at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def _stop_if_asked(self, wants_save: bool = False) -> bool:
        """Whether the main process wants to save.

        Raises: Interrupted in all processes once one of them was told to stop.
        """
        asked = distributed.largest(2 * (self.signal or 0) + (wants_save and distributed.is_main()))
        if asked > 1:
            raise Interrupted(asked // 2)
        return asked == 1
