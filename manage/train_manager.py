"""Training: what happens in which order, from the first check to the last checkpoint."""

import contextlib
import hashlib
import itertools
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configs.config import Config, config_from_dict, without_gone
from manage import distributed
from manage.checkpoint import (
    DamagedCheckpoint,
    find_checkpoint,
    keep_newest,
    load_checkpoint,
    newest_valid,
    pack,
)
from manage.data import Tolerance, check_data, keep_photos, read_split, samples_of, train_loader, val_loader
from manage.evaluation_manager import Validation, validate
from manage.experiment import (
    Curves,
    NoCurves,
    check_resumable,
    create_experiment,
    open_experiment,
    record_environment,
    rewind,
    write_folders,
)
from manage.inference import autocast
from manage.network import (
    build_network,
    check_same_network,
    check_same_tree,
    load_hierarchy,
    load_start_weights,
    load_weights,
)
from models.ema import EMA
from utils.cli import progress
from utils.dataset import Sample
from utils.errors import UserError
from utils.files import write_whole
from utils.losses import build_criterion, node_weights
from utils.schedules import lr_factor

SAVE_EVERY_S = 600  # last.pt, inside an epoch


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came; raised between two steps, where the state is whole."""


class TrainManager:
    """One training run. `run` goes from wherever the state stands to the last epoch.

    Raises: UserError before the first step for whatever a user can get wrong.
    """

    def __init__(self, config: Config, resume: str | None = None, overwrite: bool = False) -> None:
        self.config = config
        self.device = distributed.choose_device(config.device)
        distributed.start(self.device)
        self.rank, self.world = distributed.rank(), distributed.world()
        self.hierarchy = load_hierarchy(config)
        self.encoding = check_data(config, self.hierarchy)
        seed_everything(config)
        self.loader, self.batches = train_loader(config, self.hierarchy, self.rank, self.world, self.device)
        self.train_ids, self.val_ids = read_split(config, "train"), read_split(config, "val")
        self.val_loader = val_loader(config, self.hierarchy, self.val_ids, self.rank, self.world, self.device)
        self.kept_photos = keep_photos(config, {"train": self.loader, "val": self.val_loader}, self.device)
        self.steps_per_epoch = self.batches.n_batches // config.accumulate
        self._build(is_new=resume is None)
        self.epoch, self.batch, self.step = 0, 0, 0  # the next batch to train on, and optimiser steps done
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_steps = 0  # in the sum: those of this epoch that were not left out
        self.best: float | None = None
        self.seconds = 0.0
        self.tolerance = Tolerance(config.skip_unreadable, self.train_ids)
        self.val_tolerance = Tolerance(config.skip_unreadable, self.val_ids)
        self.signal: int | None = None  # what this process was told
        self.stopped_by: int | None = None  # what one of all processes was told, once all know
        self.lock, self.curves = None, NoCurves()
        self._open(resume, overwrite)

    # --- setting up ---
    def _build(self, is_new: bool) -> None:
        config = self.config
        self.network = build_network(config, self.hierarchy, self.encoding.pixels)
        if is_new:  # a run that goes on takes all from its checkpoint
            load_start_weights(self.network, self.hierarchy, config, self.say)
        self.network.to(self.device)
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if config.sync_batchnorm:
            if self.device.type != "cuda":
                raise UserError("key 'sync_batchnorm': works on GPUs only; set it to false")
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.ema = None
        if config.ema_decay:
            self.ema = EMA(self.network, config.ema_decay)
        weights = node_weights(config.node_weights, self.encoding.labelled, self.hierarchy)
        self.criterion = build_criterion(config.criterion, self.hierarchy, config.gamma, weights)
        self.optimizer = build_optimizer(self.network, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.trained: nn.Module = self.network
        if config.compile:
            self.trained = torch.compile(self.network)
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.trained, device_ids=ids)

    def _open(self, resume: str | None, overwrite: bool) -> None:
        """The experiment's folder: a new one, or the state of the one to resume."""
        config = self.config
        journal = None
        if resume is None:
            self.lock = distributed.on_main_only(create_experiment, config, self.hierarchy, overwrite)
        else:
            self.lock = distributed.on_main_only(open_experiment, config)
        try:
            if resume is not None:
                journal = self._resume(resume)
            if distributed.is_main():
                record_environment(config.experiment_dir, self.device, self.world)
                self.curves = Curves(config.experiment_dir, config.tensorboard_dir, journal)
        except OSError as error:
            self._close()
            raise UserError(f"{error.filename or config.root}: cannot be written ({error.strerror})") from None
        except UserError:
            self._close()
            raise

    def _resume(self, path: str) -> dict[str, int] | None:
        """Takes over the state of a checkpoint; "" means the newest that is whole."""
        config = self.config
        if path:
            file = find_checkpoint(path, config.checkpoints_dir, config.root)
            found = file, load_checkpoint(file)
        else:
            found = newest_valid(config.checkpoints_dir, self.say)
        if found is None:
            self.say("no checkpoint was written before the run ended; it starts from the beginning")
            return None
        source, state = str(found[0]), found[1]
        check_same_network(config, self.hierarchy, state, source)
        check_same_tree(config, self.hierarchy, state, source)
        check_resumable(config, config_from_dict(without_gone(state["config"]), f"{source}, its config"), source)
        self._check_same_photos(state, source)
        try:
            self.load_state(state, source)
            journal = dict(state["journal"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DamagedCheckpoint(f"{source}: its state cannot be taken over ({reason}); use another one") from None
        if path:
            distributed.on_main_only(rewind, config, *found)
        if not (config.checkpoints_dir / "best.pt").is_file():
            self.best = None  # none is better than what is on disk
        if state["world"] != self.world:
            self.say(
                f"{state['world']} processes before, {self.world} now: a step takes "
                f"{self.world * self.config.batch_size * self.config.accumulate} photos from here on"
            )
        done = f"epoch {self.epoch + 1}, batch {self.batch + 1}" if self.epoch < self.config.n_epochs else "its end"
        self.say(f"resumed from {source} at {done}")
        return journal

    # --- state ---
    def state(self) -> dict:
        """All that evaluation, prediction and an exact resume need; plain values and tensors."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            "best": self.best,
            "faults": [self.tolerance.faults, self.val_tolerance.faults],
            "seconds": self.seconds,
            "world": self.world,
            "random": random_state(self.device),
            "journal": self.curves.journal(),
            "config": self.config.to_dict(),
            "tree": self.hierarchy.to_dict(),
            **self._digests(),
            "versions": {"torch": str(torch.__version__), "python": sys.version.split()[0]},
        }

    def _digests(self) -> dict[str, str]:
        """What tells whether the lists of photos are still the same."""
        lists = {"train_ids": self.train_ids, "val_ids": self.val_ids}
        return {key: hashlib.sha256("\n".join(ids).encode()).hexdigest() for key, ids in lists.items()}

    def _check_same_photos(self, state: dict, source: str) -> None:
        for key, digest in self._digests().items():
            if state.get(key, digest) != digest:
                raise UserError(
                    f"{self.config.ids_file(key.removesuffix('_ids'))} lists other photos now than when {source} was "
                    "written; put the old list back, or choose another exp_name"
                )

    def load_state(self, state: dict, source: str) -> None:
        if not all(type(state[key]) is int for key in ("epoch", "batch", "step", "world")):
            raise DamagedCheckpoint(f"{source}: holds no whole numbers of epoch and step; use another checkpoint")
        load_weights(self.network, state["model"], source)
        if self.ema:
            load_weights(self.ema.module, state["ema"], source)
            self.ema.updates = int(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        if state["world"] != self.world:  # batches are counted in another unit: begin that epoch at a whole step
            done = self.batch * state["world"] // self.world
            self.batch = min(done // self.config.accumulate * self.config.accumulate, self.batches.n_batches)
            self.step = self.epoch * self.steps_per_epoch + self.batch // self.config.accumulate
        self.loss_sum.copy_(state["loss_sum"])
        self.loss_steps = int(state.get("loss_steps", state["batch"] // self.config.accumulate))  # older ones lack it
        self.best, self.seconds = state["best"], state["seconds"]
        self.tolerance.faults, self.val_tolerance.faults = map(dict, state["faults"])
        set_random_state(state["random"], self.device)

    def save(self, *names: str) -> list[str]:
        """Writes one state under each name; returns those that the disk took, and says so when it is not all.

        `last` comes last: where it stands, the others of its moment do too, and a resume misses none of them.
        """
        state = self.state()  # every process: it may take part in collective calls
        if not distributed.is_main():
            return list(names)
        folder, written = self.config.checkpoints_dir, []
        try:
            if not folder.is_dir():
                self.say(f"warning: {folder} has vanished; it is made anew")
                write_folders(self.config, self.hierarchy)
            data = pack(state)
            for name in names:
                write_whole(data, folder / f"{name}.pt", folder / "previous.pt" if name == "last" else None)
                written.append(name)
            keep_newest(folder, self.config.keep)
        except (OSError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            self.say(f"warning: no checkpoint could be written in {folder} ({reason}); the older ones stand")
        return written

    # --- running ---
    def run(self) -> int:
        """Trains to the last epoch; returns the exit status (128 + the signal's number when interrupted)."""
        config = self.config
        if self.epoch >= config.n_epochs:
            if distributed.is_main() and not (config.checkpoints_dir / "last.pt").is_file():  # it was damaged
                self.save("last")
            self.say(f"experiment {config.exp_name!r} is finished ({config.n_epochs} epochs); nothing to do")
            self._close()
            return 0
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        distributed.largest(0)  # all processes listen to signals before the first is told that the run goes on
        self._say_plan()
        try:
            while self.epoch < config.n_epochs:
                self._train_epoch()
                self._finish_epoch()
            self.tolerance.report()
            self.val_tolerance.report()
            return 0
        except Interrupted:
            saved = self.save("last")
            self.say(self._farewell(bool(saved)))
            return 128 + self.stopped_by
        except UserError:
            # Between two steps, as after a signal: what was trained is not lost. After the last epoch it was the save
            # itself that failed.
            if self.world == 1 and self.epoch < config.n_epochs:
                self.save("last")
            raise
        finally:
            self._close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _train_epoch(self) -> None:
        config = self.config
        self.batches.start_at(self.epoch, self.batch)
        self.set_train_mode()
        last_save = counted = began = time.monotonic()
        seen = 0
        bar = self._bar(self.batches.n_batches, self.batch, f"epoch {self.epoch + 1}/{config.n_epochs}")
        for group in self._groups():
            loss = self.train_step(group)
            self.batch += len(group)
            self.step += 1
            seen += len(group) * config.batch_size * self.world
            bar.update(len(group))
            now = time.monotonic()
            self.seconds, counted = self.seconds + now - counted, now
            if self.step % config.log_every == 0:
                self._log_step(bar, loss, seen / (now - began))
            self._stop_if_asked()
            if distributed.agree(now - last_save > SAVE_EVERY_S):
                last_save = now
                self.save("last")
        bar.close()
        self.seconds += time.monotonic() - counted
        self.photos_per_second = seen / max(1e-9, time.monotonic() - began)

    def _groups(self) -> Iterator[list[Sample]]:
        """The batches of each optimiser step."""
        batches = iter(self.loader)
        while group := list(itertools.islice(batches, self.config.accumulate)):
            for batch in group:
                for index, fault in samples_of(batch):
                    self.tolerance.check(index, fault)
            yield group

    def train_step(self, group: list[Sample]) -> Tensor:
        """Forward, loss, backward, optimiser step; the mean loss over the known pixels of all processes.

        The loss of each part is weighted by its share of known pixels, so that batches, accumulated batches and
        processes add up to the gradient of one large batch.
        """
        lr = self.config.lr * self._lr_factor()
        is_frozen = self.epoch < self.config.freeze_encoder_epochs
        encoder_factor = 0.0 if is_frozen else self.config.encoder_lr_factor
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr * (encoder_factor if parameters["is_encoder"] else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers_before = [buffer.clone() for buffer in self.network.buffers()]  # should this step be a bad one
        on_device = [self._to_device(batch) for batch in group]
        known = torch.stack([(labels != self.hierarchy.ignore_index).sum() for _, labels in on_device])
        total = known.sum()
        distributed.sum_over_processes([total])
        shares = known / total.clamp(min=1)
        step_loss = torch.zeros((), device=self.device)
        for part, (images, labels) in enumerate(on_device):
            with self._without_sync(part < len(group) - 1):
                with autocast(self.device, self.config.amp):
                    logits = self.trained(images)
                loss = self.criterion(logits.float(), labels) * shares[part]
                self.scaler.scale(loss * self.world).backward()  # DDP averages, we want the sum
            step_loss += loss.detach()
        distributed.sum_over_processes([step_loss])
        if self._gradient_is_fine(step_loss, group):
            self.scaler.step(self.optimizer)
            if self.ema:
                self.ema.update(self.network)
            self.loss_sum += step_loss
            self.loss_steps += 1
        self.scaler.update()
        return step_loss

    def _lr_factor(self) -> float:
        config, steps = self.config, self.steps_per_epoch
        warmup, total = config.warmup_epochs * steps, config.n_epochs * steps
        return lr_factor(config.schedule, self.step, total, warmup, config.poly_power)

    def _gradient_is_fine(self, loss: Tensor, group: list[Sample]) -> bool:
        """Clips, and stops at a loss or gradient that is not finite."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        if bool(torch.isfinite(loss + norm)):
            return True
        if torch.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return False  # fp16 overflow: the scaler lowers its scale, which falls below 1 where that is no help
        self._on_non_finite(float(loss), float(norm), group)
        return False

    def _on_non_finite(self, loss: float, norm: float, group: list[Sample]) -> None:
        """Stops the run. All processes come here in the same step: loss and gradient are of all."""
        ids = [self.train_ids[index] for batch in group for index in batch.index.tolist()]
        photos = "Photos: " + ", ".join(sample_id for part in distributed.gather(ids) for sample_id in part)
        what = f"step {self.step} (epoch {self.epoch + 1}): loss {loss:g}, gradient norm {norm:g}"
        for buffer, before in zip(self.network.buffers(), self.buffers_before, strict=True):
            buffer.copy_(before)  # BatchNorm has seen the bad batch
        raise UserError(
            f"{what} is not finite. {photos}. {self._save_batch(group, ids)}. Lower lr, or set grad_clip (such as 1.0)"
        )

    def _save_batch(self, group: list[Sample], ids: list[str]) -> str:
        """Writes what reproduces a failing step, each process its own part; returns a sentence that says where."""
        part = f"_rank{self.rank}" if self.world > 1 else ""
        path = self.config.experiment_dir / f"non_finite_step_{self.step}{part}.pt"
        batches = [{"image": batch.image, "labels": batch.labels} for batch in group]
        model, fault = self.network.state_dict(), ""
        try:
            torch.save({"step": self.step, "ids": ids, "batches": batches, "model": model}, path)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError for a folder that is gone
            fault = f"{path} ({str(error).splitlines()[0]})"
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # no half of a file stays
        if faults := [fault for fault in distributed.gather(fault) if fault]:
            return f"The batch could not be saved in {', '.join(faults)}"
        return f"The batch and the weights before it are in {', '.join(map(str, distributed.gather(path)))}"

    def _finish_epoch(self) -> None:
        """Validates, draws the curves, and saves."""
        config, number = self.config, self.epoch + 1
        is_last = number == config.n_epochs
        record = {"epoch": number, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        record["loss_train"] = float(self.loss_sum) / self.loss_steps if self.loss_steps else None
        record["photos_per_second"] = getattr(self, "photos_per_second", 0.0)
        is_best, best_before = False, self.best
        if is_last or number % config.val_every == 0:
            result = self._validate()
            record |= result.scores
            is_best = self._is_best(result.scores)
            self._draw(result, number)
        record["train_seconds"] = self.seconds
        self.curves.scalars(self._epoch_curves(record), number)
        self.curves.line(record)
        self.say("  ".join(f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, float)))
        self.epoch, self.batch = number, 0
        self.loss_sum.zero_()
        self.loss_steps = 0
        if is_last:
            self._log_hparams(record)
        is_kept = is_last or number % config.save_epoch == 0
        names = [*["best"] * is_best, *[f"checkpoint_{number}"] * is_kept, "last"]
        written = self.save(*names)
        if is_best and "best" not in written:
            self.best = best_before  # the next one that is better than what is on disk is the best
        if is_last and "last" not in written:
            raise UserError(
                f"the last checkpoint could not be written in {config.checkpoints_dir}; free space, --resume"
            )
        self._stop_if_asked()

    def _validate(self) -> Validation:
        network = self.ema.module if self.ema else self.network
        distributed.copy_from_main(network.buffers())  # each process has counted its own BatchNorm statistics
        bar = self._bar(len(self.val_loader), 0, "validation")
        return validate(
            network,
            self.val_loader,
            self.hierarchy,
            self.config,
            self.criterion,
            self.val_tolerance,
            bar,
            between=self._stop_if_asked,
        )

    def _is_best(self, scores: dict) -> bool:
        direction, name = self.config.monitor.split()
        value = scores[name]
        if value is None or not math.isfinite(value):
            return False
        is_best = self.best is None or (value > self.best if direction == "max" else value < self.best)
        if is_best:
            self.best = value
        return is_best

    # --- curves ---
    def _epoch_curves(self, record: dict) -> dict[str, float]:
        kept = {"loss_train", "loss_val"}
        curves = {}
        for key, value in record.items():
            if not isinstance(value, int | float):
                continue
            stem = key.rstrip("0123456789")
            with_background = key.endswith("_with_background")
            metric = "mIoU_with_background" if with_background else stem
            if key in kept or (metric == "mIoU" and "mIoU" in self.config.metrics):
                curves[key] = value
            elif metric in self.config.metrics:
                curves[f"val/{key}"] = value
        curves["train/photos_per_second"] = record["photos_per_second"]
        curves["train/memory_GiB"] = peak_memory(self.device) / 2**30
        return curves

    def _draw(self, result: Validation, epoch: int) -> None:
        for name, picture in result.pictures.items():
            self.curves.picture(f"val_pictures/{name}", picture, epoch)
        per_class = {f"val_IoU_level{lv}/{name}": v for lv, name, v in result.per_class if v is not None}
        self.curves.scalars(per_class, epoch)
        for level, (name, picture) in enumerate(result.confusion_pictures.items(), start=1):
            self.curves.picture(f"val_confusion/level{level}_{name}", picture, epoch)

    def _log_step(self, bar: tqdm, loss: Tensor, rate: float) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        values = {"loss": float(loss), "lr": lr}
        bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{lr:.2g}", photos=f"{rate:.1f}/s", refresh=False)
        self.curves.scalars(values, self.step)

    def _log_hparams(self, record: dict) -> None:
        """The config against the curves that stand on their own: losses and mIoU."""
        self.curves.hparams(self.config.to_dict(), [name for name in self._epoch_curves(record) if "/" not in name])

    # --- small things ---
    def set_train_mode(self) -> None:
        self.trained.train()
        if self.epoch < self.config.freeze_encoder_epochs:
            self.network.encoder.eval()  # its rate is 0 as well
        if self.config.freeze_batchnorm:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def say(self, text: str) -> None:
        """A line on screen, from one process."""
        if distributed.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _to_device(self, batch: Sample) -> tuple[Tensor, Tensor]:
        images = batch.image.to(self.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, batch.labels.to(self.device, non_blocking=True)

    def _without_sync(self, more_to_come: bool):
        if more_to_come and isinstance(self.trained, DistributedDataParallel):
            return self.trained.no_sync()
        return contextlib.nullcontext()

    def _bar(self, total: int, initial: int, name: str) -> tqdm:
        return progress(total=total, initial=initial, desc=name, leave=False, disable=not distributed.is_main())

    def _say_plan(self) -> None:
        config = self.config
        batch = config.batch_size * config.accumulate * self.world
        self.say(
            f"experiment {config.exp_name!r}: {len(self.train_ids)} train and {len(self.val_ids)} val photos, "
            f"{config.n_epochs} epochs of {self.steps_per_epoch} steps of {batch} photos "
            f"({config.batch_size} x {config.accumulate} accumulated x {self.world} processes) on {self.device}"
        )
        self.say(self.kept_photos)

    def _farewell(self, saved: bool) -> str:
        name = signal.Signals(self.stopped_by).name
        if not saved:
            return f"stopped by {name}; the newest checkpoint could not be written, the one before stands"
        return (
            f"stopped by {name} after step {self.step}; all is saved. Go on with: the same command and --resume"
            f" (such as python train.py --cfg configs/{self.config.exp_name}.json --resume)"
        )

    def _on_signal(self, number: int, _frame) -> None:
        if self.signal is not None:  # the second one ends at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def _stop_if_asked(self) -> None:
        """Raises Interrupted in all processes once one of them was told to stop."""
        asked = distributed.largest(self.signal or 0)
        if asked:
            self.stopped_by = asked  # this process's own signal may come later still
            raise Interrupted

    def _close(self) -> None:
        self.curves.close()
        if self.lock is not None:
            self.lock.release()


def build_optimizer(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW; biases and normalisation are not decayed."""
    encoder = {*network.encoder.parameters()}
    groups = [
        {"params": params, "weight_decay": decay, "is_encoder": is_encoder}
        for is_encoder in (False, True)
        for decay, of_kind in ((config.weight_decay, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim <= 1))
        if (params := [p for p in network.parameters() if (p in encoder) == is_encoder and of_kind(p)])
    ]
    fused = next(network.parameters()).device.type in ("cpu", "cuda")  # one pass over the weights
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)


def seed_everything(config: Config) -> None:
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def random_state(device: torch.device) -> dict:
    """The states of all generators, as plain values that load safely."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict, device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: on its GPU, else resident in the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss of a new process starts at what its parent had reached
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    except (OSError, TypeError):  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
