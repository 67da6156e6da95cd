"""Evaluation: whole photos at native size, one pass, every level; scores, tables and pictures."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs.config import DECODE_RULES, Config
from manage import distributed, report
from manage.checkpoint import checkpoint_digest, find_checkpoint, load_checkpoint
from manage.data import Tolerance, batches_of, check_data, read_split, val_loader
from manage.experiment import environment
from manage.inference import photo_logits
from manage.network import check_same_network, load_hierarchy, restore_network, root_bias
from manage.tables import confusions, per_class, rules_table, summary, table, write_csv
from utils import visualize
from utils.cli import progress
from utils.decode import DECODERS
from utils.errors import UserError
from utils.files import write_json
from utils.hierarchy import Hierarchy
from utils.images import write_indexed
from utils.metrics import LevelScores

N_PICTURES = 4  # val photos drawn in TensorBoard at each validation


@dataclass
class Prediction:
    """One val photo: image (3, h, w) as it was fed, labels (H, W), logits (1, N, H, W) at native size."""

    index: int
    image: Tensor
    labels: Tensor
    logits: Tensor


@dataclass
class Validation:
    """What a validation in training shows: scores by name, IoU by (level, class, value), and pictures."""

    scores: dict[str, float | None]
    per_class: list[tuple[int, str, float | None]]
    pictures: dict[str, np.ndarray]
    confusion_pictures: dict[str, np.ndarray]


def predictions(
    network: nn.Module,
    loader: DataLoader,
    device: torch.device,
    tolerance: Tolerance,
    amp: str,
    bar: tqdm,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Prediction]:
    """Every readable photo of the loader through the network; `between` is called before each photo."""
    network.eval()
    rounds = distributed.largest(len(loader))
    for sample in batches_of(loader):
        between()
        bar.update()
        if not tolerance.check(sample.index, sample.fault):
            continue
        image, labels = sample.image.to(device, non_blocking=True), sample.labels.to(device, non_blocking=True)
        yield Prediction(sample.index, image, labels, photo_logits(network, image, tuple(labels.shape), amp))
    for _ in range(rounds - len(loader)):  # processes may meet in `between`: all call it equally often
        between()


def validate(
    network: nn.Module,
    loader: DataLoader,
    hierarchy: Hierarchy,
    config: Config,
    criterion: Callable[[Tensor, Tensor], Tensor],
    tolerance: Tolerance,
    bar: tqdm,
    between: Callable[[], None],
) -> Validation:
    """Scores, loss and a few pictures over all photos of the loader; `between` is called before each photo."""
    device = next(network.parameters()).device
    meter, bias = LevelScores(hierarchy, device), root_bias(config, hierarchy)
    decode = DECODERS[config.decode]
    loss_sum = torch.zeros(2, dtype=torch.float64, device=device)  # sum over known pixels, and their number
    pictures: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for prediction in predictions(network, loader, device, tolerance, config.amp, bar, between):
            logits, labels = prediction.logits, prediction.labels[None]
            leaves = decode(logits, hierarchy, bias)
            meter.update(leaves, labels, logits)
            known = (labels != hierarchy.ignore_index).sum()
            loss_sum += torch.stack([criterion(logits, labels) * known, known])
            if len(pictures) < N_PICTURES:
                pictures[f"{loader.dataset.files[prediction.index].photo.stem}"] = _panel(prediction, leaves, hierarchy)
    bar.close()
    distributed.sum_over_processes([*meter.tensors(), loss_sum])
    result = meter.compute()
    scores = summary(result) | {"loss_val": float(loss_sum[0] / loss_sum[1].clamp(min=1))}
    confusion = {
        hierarchy.level_names[level]: visualize.confusion_picture(matrix, names)
        for level, (names, matrix) in enumerate(confusions(result))
    }
    return Validation(scores, per_class(result), pictures, confusion)


def _panel(prediction: Prediction, leaves: Tensor, hierarchy: Hierarchy) -> np.ndarray:
    photo = prediction.image.permute(1, 2, 0).cpu().numpy()
    truth, predicted = prediction.labels.cpu().numpy(), leaves[0].cpu().numpy()
    return visualize.board(photo, truth, predicted, hierarchy)


# --- evaluate.py ---
@dataclass
class EvaluationOptions:
    """The command line of evaluate.py: checkpoint name, number of photos, decoding rule, whether to draw."""

    checkpoint: str | None = None
    limit: int | None = None
    decode: str | None = None
    pictures: bool = True


class EvaluationManager:
    """Scores one checkpoint on the val split.

    Raises: UserError before the first photo for whatever a user can get wrong.
    """

    def __init__(self, config: Config, options: EvaluationOptions) -> None:
        self.config, self.options = config, options
        self.device = distributed.choose_device(config.device)
        distributed.start(self.device)
        hierarchy = load_hierarchy(config)
        name = options.checkpoint or config.eval_checkpoint
        if not name:
            raise UserError(
                "key 'eval_checkpoint' is empty; name a checkpoint there or with --checkpoint (such as best)"
            )
        if options.limit is not None and options.limit < 1:
            raise UserError(f"--limit {options.limit}: expected at least 1 photo")
        self.checkpoint = find_checkpoint(name, config.checkpoints_dir, config.root)
        self.digest = checkpoint_digest(self.checkpoint)  # first: if a training replaces it now, the two do not match
        state = load_checkpoint(self.checkpoint)
        check_same_network(config, hierarchy, state, str(self.checkpoint))
        trained_with, self.hierarchy, network = restore_network(state, str(self.checkpoint))
        self.short_side = trained_with.short_side
        if config.short_side != trained_with.short_side:
            raise UserError(
                f"key 'short_side': {config.short_side}, but {self.checkpoint} was trained at "
                f"{trained_with.short_side}; use the config that it was trained with"
            )
        if trained_with.root_bias and trained_with.root_bias != config.root_bias and distributed.is_main():
            print(
                f"the checkpoint's own root_bias {trained_with.root_bias}, fitted for {trained_with.decode}, is not "
                "used: evaluate.py takes decode and root_bias from its config and overrides"
            )
        self.trained_with, self.epoch = trained_with, state["epoch"]
        self.network = network.to(self.device, memory_format=torch.channels_last)  # on a CPU a fifth faster
        check_data(config, hierarchy, ["val"])
        self.ids = read_split(config, "val")[: options.limit]
        self.loader = val_loader(config, self.hierarchy, self.ids, distributed.rank(), distributed.world())
        self.tolerance = Tolerance(config.skip_unreadable, self.ids)
        chosen = options.decode or config.decode
        self.rules = [config.decode, *(r for r in DECODE_RULES if r != config.decode)] if chosen == "all" else [chosen]
        self.folder = config.experiment_dir / "evaluation" / self._name()

    def run(self) -> dict:
        """Writes scores and pictures, prints the table, returns what scores.json holds."""
        distributed.on_main_only(self._make_folder)
        began = time.monotonic()
        meters = {rule: LevelScores(self.hierarchy, self.device) for rule in self.rules}
        counts: dict[int, list[np.ndarray]] = {}  # photo -> confusion matrix by rule
        # in the unit of the config's own rule: logits or probabilities, so no other rule takes it
        biases = {self.config.decode: root_bias(self.config, self.hierarchy)}
        bar = progress(total=len(self.loader), desc="evaluate", disable=not distributed.is_main())
        with torch.inference_mode(), PictureWriter(self.folder, self.hierarchy, self.options.pictures) as writer:
            for prediction in predictions(self.network, self.loader, self.device, self.tolerance, self.config.amp, bar):
                labels = prediction.labels[None]
                counts[prediction.index] = []
                for rule, meter in meters.items():
                    leaves = DECODERS[rule](prediction.logits, self.hierarchy, biases.get(rule))
                    logits = prediction.logits if rule == self.rules[0] else None  # violations are of no rule
                    matrix = meter.update(leaves, labels, logits)
                    counts[prediction.index].append(matrix.cpu().numpy())
                    if rule == self.rules[0]:
                        writer.add(self.ids[prediction.index], prediction, leaves[0])
        bar.close()
        for meter in meters.values():
            meter.violations.copy_(meters[self.rules[0]].violations)
        for meter in meters.values():
            distributed.sum_over_processes(meter.tensors())
        counts = {index: value for part in distributed.gather(counts) for index, value in part.items()}
        faults = {key: value for part in distributed.gather(self.tolerance.faults) for key, value in part.items()}
        violations = {key: value for part in distributed.gather(writer.violations) for key, value in part.items()}
        if len(counts) + len(faults) != len(self.ids):
            raise RuntimeError(f"saw {len(counts)} of {len(self.ids)} photos")
        results = {rule: meter.compute() for rule, meter in meters.items()}
        return (
            distributed.on_main_only(self._write, results, counts, faults, violations, time.monotonic() - began) or {}
        )

    @property
    def _is_own(self) -> bool:
        """The checkpoint lies in the experiment's folder: it is not one of another experiment, given by its path."""
        return self.checkpoint.parent.resolve().is_relative_to(self.config.checkpoints_dir.resolve())

    def _name(self) -> str:
        """The checkpoint's name, and what makes this evaluation another one."""
        name = self.checkpoint.stem if self._is_own else f"{self.trained_with.exp_name}-{self.checkpoint.stem}"
        if self.options.limit is not None:
            name += f"-limit{self.options.limit}"
        if self.options.decode not in (None, "all") and self.options.decode != self.config.decode:
            name += f"-{self.options.decode}"
        return name

    def _make_folder(self) -> None:
        try:
            if self.folder.exists():
                stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.folder.stat().st_mtime))
                aside = self.folder.with_name(f"{self.folder.name}.old-{stamp}")
                self.folder.rename(aside)
                print(f"an earlier evaluation was moved to {aside}")
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from None

    def _write(self, results: dict, counts: dict, faults: dict, violations: dict, seconds: float) -> dict:
        first = self.rules[0]
        record = {
            "checkpoint": self.checkpoint.name if self._is_own else str(self.checkpoint.resolve()),
            "checkpoint_sha256": self.digest,
            "epoch": self.epoch,
            "amp": self.config.amp,  # of this evaluation; "config" is the training's
            "decode": first,
            "root_bias": self.config.root_bias if first == self.config.decode else {},
            "photos": len(counts),
            "left_out": faults,
            "seconds": round(seconds, 1),
            "scores": summary(results[first]),
            "levels": results[first]["levels"],
            "rules": {rule: summary(result) for rule, result in results.items()},
            "config": self.trained_with.to_dict(),
            "tree": self.hierarchy.to_dict(),
            "environment": environment(self.device) | {"processes": distributed.world()},
        }
        write_json(record, self.folder / "scores.json")
        write_csv(results, self.folder / "scores.csv")
        order = sorted(counts)
        np.savez_compressed(
            self.folder / "photos.npz",
            ids=np.array([self.ids[index] for index in order]),
            **{
                rule: np.stack([counts[index][i] for index in order]).astype(np.int32) if order else np.zeros(0)
                for i, rule in enumerate(self.rules)
            },
        )
        if self.options.pictures:
            photos = [
                report.photo_line(self.ids[i], counts[i][0], violations[self.ids[i]], self.hierarchy) for i in order
            ]
            report.write_report(self.folder, record, photos, self.hierarchy)
        print(table(results[first], self.hierarchy))
        if len(results) > 1:
            print(rules_table(record["rules"]))
        for sample_id, fault in faults.items():
            print(f"left out: {sample_id}: {fault}")
        bias = f" with root_bias {record['root_bias']}" if record["root_bias"] else ""
        bias += " (the other rules without)" if bias and len(results) > 1 else ""
        print(f"{len(counts)} photos, decoded by {first}{bias}; scores and pictures are in {self.folder}")
        return record


class PictureWriter:
    """Draws predictions in threads beside the network: per level an indexed PNG, an overlay, and the report's files."""

    def __init__(self, folder: Path, hierarchy: Hierarchy, is_on: bool, threads: int = 2, waiting: int = 16) -> None:
        self.folder, self.hierarchy, self.is_on, self.waiting = folder / "pictures", hierarchy, is_on, waiting
        self.pool = ThreadPoolExecutor(threads) if is_on else None
        self.jobs: list = []
        self.violations: dict[str, float | None] = {}  # id -> violated share, known once the photo is drawn

    def __enter__(self) -> "PictureWriter":
        if self.is_on:
            for name in (*self.hierarchy.level_names, "overlay", "report"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=kind is not None)
            if kind is None:
                self._collect(0)

    def add(self, sample_id: str, prediction: Prediction, leaves: Tensor) -> None:
        if self.pool is not None:
            photo = prediction.image.permute(1, 2, 0).cpu().numpy()
            maps = report.small_maps(prediction.labels, leaves, prediction.logits[0], self.hierarchy.ignore_index)
            self.jobs.append(self.pool.submit(self._draw, sample_id, photo, leaves.to(torch.uint8).cpu().numpy(), maps))
            self._collect(self.waiting)

    def _collect(self, allowed: int) -> None:
        """Waits until at most `allowed` photos are being drawn; an error while drawing is raised here."""
        while len(self.jobs) > allowed:
            try:
                self.jobs.pop(0).result()
            except OSError as error:
                raise UserError(f"{self.folder}: pictures cannot be written ({error.strerror})") from None

    def _draw(self, sample_id: str, photo: np.ndarray, leaves: np.ndarray, maps: report.SmallMaps) -> None:
        h = self.hierarchy
        self.violations[sample_id] = report.write_photo(self.folder / "report", sample_id, photo, maps, h)
        for level, name in enumerate(h.level_names):
            write_indexed(self.folder / name / f"{sample_id}.png", h.level_of(leaves, level), h.colours)
        picture = Image.fromarray(visualize.captioned_overlay(photo, leaves, h))
        picture.save(self.folder / "overlay" / f"{sample_id}.jpg", quality=85)
