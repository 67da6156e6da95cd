"""Evaluation: whole photos at native size, one pass, every level; scores, tables and pictures."""

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from configs.config import (
    DECODE_RULES,
    REPOSITORY,
    Config,
    config_from_dict,
    default_decode,
    differences,
    load_config,
    parse_overrides,
)
from manage import distributed, report
from manage.checkpoint import checkpoint_digest, find_checkpoint, find_model, load_checkpoint
from manage.data import Tolerance, ValLoader, check_data, read_split
from manage.experiment import environment
from manage.inference import Rows, chosen_amp, logit_rows, photo_named
from manage.network import tree_changes
from manage.predictor import Decoding, Predictor
from manage.tables import per_class, rules_table, summary, table, write_csv
from utils import visualize
from utils.cli import progress
from utils.dataset import Sample
from utils.errors import UserError
from utils.files import read_json, set_aside, write_json
from utils.hierarchy import Hierarchy
from utils.images import read_photo
from utils.metrics import LevelScores

OF_THE_NETWORK = ("encoder", "decoder_channels", "short_side", "decode", "root_bias", "tta")  # keys of its training
# keys of scores.json: where they are equal, so are the scores
IDENTITY = "checkpoint_sha256 amp tta tile decode root_bias photos ids_sha256 left_out pictures".split()
N_PICTURES = 4  # val photos drawn in TensorBoard at each validation
DRAWN_AT_ONCE = 4  # photos that threads draw, or have before them, beside the network


@dataclass
class Validation:
    """What a validation in training shows: scores by name, IoU by (level, class, value), and pictures."""

    scores: dict[str, float | None]
    per_class: list[tuple[int, str, float | None]]
    pictures: dict[str, np.ndarray]


def predictions(
    network: nn.Module,
    loader: ValLoader,
    tolerance: Tolerance,
    how: dict[str, Any],
    bar: tqdm,
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Sample, Rows]]:
    """Every readable photo of the loader, fed as `how` tells `logit_rows`; `between` is called before each photo."""
    network.eval()
    rounds = distributed.largest(len(loader))
    for sample in loader:
        between()
        bar.update()
        if tolerance.check(sample.index, sample.fault):
            yield sample, logit_rows(network, sample.image, tuple(sample.labels.shape), **how)
    for _ in range(rounds - len(loader)):  # processes may meet in `between`: all call it equally often
        between()


def validate(
    network: nn.Module,
    loader: ValLoader,
    hierarchy: Hierarchy,
    config: Config,
    criterion: Callable[[Tensor, Tensor], Tensor],
    tolerance: Tolerance,
    bar: tqdm,
    between: Callable[[], None],
) -> Validation:
    """Scores, loss and a few pictures over all photos of the loader; `between` is called before each photo."""
    device = next(network.parameters()).device
    meter, decode = LevelScores(hierarchy, device, default_decode(config.criterion)), Decoding.of(config)
    loss_sum = torch.zeros(2, dtype=torch.float64, device=device)  # sum over known pixels, and their number
    pictures: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for sample, bands in predictions(network, loader, tolerance, {"amp": config.amp}, bar, between):
            leaves = torch.empty_like(sample.labels)
            with photo_named(tolerance.ids[sample.index]):
                for rows, logits in bands:
                    labels = sample.labels[None, rows]
                    leaves[rows] = decode(logits, hierarchy)[0]
                    meter.update(leaves[None, rows], labels, logits)
                    known = (labels != hierarchy.ignore_index).sum()
                    loss_sum += torch.stack([criterion(logits, labels) * known, known])
            if len(pictures) < N_PICTURES:
                pictures[loader.photos.files[sample.index].photo.stem] = _sheet(sample, leaves, hierarchy)
    bar.close()
    distributed.sum_over_processes([*meter.tensors(), loss_sum])
    result = meter.compute()
    scores = summary(result) | {"loss_val": float(loss_sum[0] / loss_sum[1].clamp(min=1))}
    return Validation(scores, per_class(result), pictures)


def _sheet(sample: Sample, leaves: Tensor, hierarchy: Hierarchy, side: int = 240) -> np.ndarray:
    """Photo over overlay, and at each level truth over prediction."""
    photo, truth, leaves = (x.cpu().numpy() for x in (sample.image.permute(1, 2, 0), sample.labels, leaves))
    photo = np.array(Image.fromarray(photo).resize(leaves.shape[::-1]))
    pictures = ((photo, truth), (visualize.overlay(photo, leaves, hierarchy), leaves))
    rows = [[picture, *visualize.level_maps(labels, hierarchy, side)] for picture, labels in pictures]
    titles = ["photo, overlay", *(f"{name}: truth, predicted" for name in hierarchy.level_names)]
    return visualize.gallery(rows, titles, hierarchy, side)


# --- evaluate.py ---
class Counted(NamedTuple):
    """Of one photo: a confusion matrix by each rule, the share of violated (pixel, edge) pairs, height and width."""

    matrices: list[np.ndarray]
    violations: float | None
    size: tuple[int, int]


@dataclass
class EvaluationOptions:
    """The command line of evaluate.py. Decoding and views that are None are the checkpoint's own."""

    checkpoint: str | None = None
    limit: int | None = None
    decode: str | None = None
    pictures: bool = True
    all_rules: bool = False
    root_bias: dict[str, float] | None = None
    tta: str | None = None
    tile: int | None = None


def to_evaluate(cfg: str | None, checkpoint: str | None, overrides: list[str]) -> tuple[Config, str | None]:
    """The config of the file, or without one that of a checkpoint given by its path, with overrides; the checkpoint."""
    if cfg is None and checkpoint is not None:
        try:
            path = find_model(checkpoint, REPOSITORY)
        except UserError:  # `best`, say: of the experiment that the overrides name
            return load_config(None, overrides), checkpoint
        values = load_checkpoint(path)["config"] | parse_overrides(overrides)
        return config_from_dict(values, f"{path}, its config", is_record=True), str(path)
    return load_config(cfg, overrides), checkpoint


class EvaluationManager:
    """Scores one checkpoint on the val split.

    Raises: UserError before the first photo for whatever a user can get wrong.
    """

    def __init__(self, config: Config, options: EvaluationOptions) -> None:
        self.options, self.device = options, distributed.choose_device(config.device)
        distributed.start(self.device)
        if options.limit is not None and options.limit < 1:
            raise UserError(f"--limit {options.limit}: expected at least 1 photo")
        name = options.checkpoint or config.eval_checkpoint or "best"
        self.checkpoint = find_checkpoint(name, config.checkpoints_dir, config.root)
        self.digest = checkpoint_digest(self.checkpoint)  # first: if a training replaces it now, the two do not match
        own = {key: getattr(options, key) for key in ("decode", "root_bias", "tta", "tile")}
        self.predictor = Predictor.load(self.checkpoint, config.device, **own)
        self.trained_with, self.hierarchy = self.predictor.config, self.predictor.hierarchy
        self._say_what_is_not_used(config)
        self.config = config = replace(config, short_side=self.trained_with.short_side)
        check_data(config, self.hierarchy, ["val"])
        self.ids = read_split(config, "val")[: options.limit]
        self.loader = ValLoader(config, self.hierarchy, self.ids, distributed.rank(), distributed.world(), self.device)
        self.tolerance = Tolerance(config.skip_unreadable, self.ids)
        first, rules = self.predictor.decoding, DECODE_RULES if options.all_rules else ()
        self.decodings = [first, *(Decoding(rule, {}) for rule in rules if rule != first.rule)]
        self.how = self.predictor.how | {"amp": config.amp}
        self.folder = config.experiment_dir / "evaluation" / self._name()
        self.unfinished = self.folder.with_name(f"{self.folder.name}.unfinished")

    def _say_what_is_not_used(self, config: Config) -> None:
        """A network is fed and decoded as it was trained, whatever the config says of that."""
        if not distributed.is_main():
            return
        if config.hierarchy_file.is_file():
            changes = tree_changes(self.hierarchy, Hierarchy.load(config.hierarchy_file))
            if changes := [part for part in changes if part != "name"]:
                print(f"note: the config's tree has other {', '.join(changes)}: scores are by the checkpoint's")
        for key, (ours, own) in differences(config, self.trained_with).items():
            is_given = getattr(self.options, key, None) is not None or ours == getattr(Config(), key)
            if key in OF_THE_NETWORK and not is_given:
                print(f"note: the config's {key} {ours} is not used, but the checkpoint's own {own}")

    def run(self) -> dict:
        """Writes scores and pictures, prints the table, returns what scores.json holds."""
        distributed.on_main_only(self._make_folder)
        began = time.monotonic()
        own_rule = default_decode(self.trained_with.criterion)  # of the probabilities, whatever rule decodes
        meters = [LevelScores(self.hierarchy, self.device, own_rule) for _ in self.decodings]
        counted: dict[int, Counted] = {}
        drawing: deque[Future] = deque()
        bar = progress(total=len(self.loader), desc="evaluate", disable=not distributed.is_main())
        with torch.inference_mode(), ThreadPoolExecutor(2) as drawers:
            for sample, bands in predictions(self.predictor.network, self.loader, self.tolerance, self.how, bar):
                with photo_named(self.ids[sample.index]):
                    counted[sample.index], *pictures = self._score(sample, bands, meters)
                if self.options.pictures:
                    drawing.append(drawers.submit(self._draw, sample.index, *pictures))
                while len(drawing) > DRAWN_AT_ONCE:  # an error while drawing is raised here
                    drawing.popleft().result()
        for job in drawing:
            job.result()
        bar.close()
        for meter in meters:
            distributed.sum_over_processes(meter.tensors())
        for meter in meters[1:]:  # of no rule: violations, and the calibration of the roots
            meter.violations, meter.calibration[1:] = meters[0].violations, meters[0].calibration[1:]
        counted, faults = (
            {key: value for part in distributed.gather(found) for key, value in part.items()}
            for found in (counted, self.tolerance.faults)
        )
        if len(counted) + len(faults) != len(self.ids):
            raise RuntimeError(f"saw {len(counted)} of {len(self.ids)} photos")
        results = {decoding.rule: meter.compute() for decoding, meter in zip(self.decodings, meters, strict=True)}
        return distributed.on_main_only(self._write, results, counted, faults, time.monotonic() - began) or {}

    def _score(
        self, sample: Sample, bands: Rows, meters: list[LevelScores]
    ) -> tuple[Counted, np.ndarray, report.SmallMaps]:
        """Adds a photo to the meters; its counts, the leaf of each pixel, and what the page shows."""
        labels, matrices = sample.labels, [0] * len(meters)
        leaves, maps = torch.empty_like(labels), report.MapSampler(labels)
        before = meters[0].violations.clone()
        for rows, logits in bands:
            for i, (decoding, meter) in enumerate(zip(self.decodings, meters, strict=True)):
                decided = decoding(logits, self.hierarchy)
                matrices[i] += meter.update(decided, labels[None, rows], None if i else logits)
                if i == 0:
                    leaves[rows] = decided[0]
            maps.add(rows, logits[0])
        violated, pixels = (meters[0].violations - before).tolist()
        rate = violated / pairs if (pairs := pixels * len(self.hierarchy.edges)) else None
        counted = Counted([matrix.cpu().numpy() for matrix in matrices], rate, tuple(labels.shape))
        return counted, leaves.cpu().numpy(), maps.maps(leaves)

    def _draw(self, index: int, leaves: np.ndarray, maps: report.SmallMaps) -> None:
        """Per level an indexed PNG, an overlay, and the report's files."""
        photo = np.asarray(
            read_photo(self.loader.photos.files[index].photo)
        )  # as the camera took it, not as it was fed
        folder = self.unfinished / "pictures"
        try:
            visualize.write_maps(folder, self.ids[index], photo, leaves, self.hierarchy)
            report.write_photo(folder / "report", self.ids[index], photo, maps)
        except OSError as error:
            raise UserError(f"{folder}: pictures cannot be written ({error.strerror})") from None

    @property
    def _is_own(self) -> bool:
        """The checkpoint lies in the experiment's folder: it is not one of another experiment, given by its path."""
        return self.checkpoint.parent.resolve().is_relative_to(self.config.checkpoints_dir.resolve())

    def _name(self) -> str:
        """The checkpoint's name, and what the command line says otherwise."""
        options, stem = self.options, self.checkpoint.stem
        names = [stem if self._is_own else f"{self.trained_with.exp_name}-{stem}"]
        names += [options.limit and f"limit{options.limit}", options.decode, options.root_bias and "bias", options.tta]
        return "-".join(filter(None, [*names, options.tile and f"tile{options.tile}"]))

    def _make_folder(self) -> None:
        try:
            shutil.rmtree(self.unfinished, ignore_errors=True)  # of an evaluation that was stopped
            self.unfinished.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.unfinished}: cannot be written ({error.strerror})") from None

    def _move_into_place(self) -> None:
        """An equal evaluation is replaced, any other one is set aside."""
        if self.folder.exists():
            if _identity(self.folder) == _identity(self.unfinished):
                shutil.rmtree(self.folder)
            else:
                print(f"an earlier evaluation, of other weights or options, was moved to {set_aside(self.folder)[0]}")
        self.unfinished.rename(self.folder)

    def _record(self, results: dict, n_photos: int, faults: dict, seconds: float) -> dict:
        """What scores.json holds."""
        first = self.decodings[0]
        return {
            "checkpoint": self.checkpoint.name if self._is_own else str(self.checkpoint.resolve()),
            "checkpoint_sha256": self.digest,
            "epoch": self.predictor.epoch,
            "amp": chosen_amp(self.device, self.config.amp),  # of this evaluation; "config" is the training's
            "tta": self.how["tta"],
            "tile": self.how["tile"],
            "decode": first.rule,
            "root_bias": first.root_bias,
            "photos": n_photos,
            "ids_sha256": hashlib.sha256("\n".join(self.ids).encode()).hexdigest(),
            "left_out": faults,
            "pictures": self.options.pictures,
            "seconds": round(seconds, 1),
            "scores": summary(results[first.rule]),
            "levels": results[first.rule]["levels"],
            "rules": {rule: summary(result) for rule, result in results.items()},
            "config": self.trained_with.to_dict(),
            "tree": self.hierarchy.to_dict(),
            "environment": environment(self.device) | {"processes": distributed.world()},
        }

    def _write(self, results: dict, counted: dict[int, Counted], faults: dict, seconds: float) -> dict:
        record, order = self._record(results, len(counted), faults, seconds), sorted(counted)
        ids, n = np.array([self.ids[index] for index in order]), self.hierarchy.num_nodes
        matrices = {
            rule: np.array([counted[index].matrices[i] for index in order], np.int32).reshape(-1, n, n)
            for i, rule in enumerate(results)
        }
        try:
            write_json(record, self.unfinished / "scores.json")
            write_csv(results, self.unfinished / "scores.csv")
            np.savez_compressed(self.unfinished / "photos.npz", ids=ids, **matrices)
            if self.options.pictures:
                lines = [report.photo_line(self.ids[i], *counted[i], self.hierarchy) for i in order]
                report.write_report(self.unfinished, record, lines, self.hierarchy)
            self._move_into_place()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from None
        print(table(results[record["decode"]], self.hierarchy))
        if len(results) > 1:
            print(rules_table(record["rules"]))
        self.tolerance.faults = faults
        self.tolerance.report()
        how = f"decoded by {self.decodings[0]}, tta {record['tta']}"
        print(f"{len(ids)} photos by {self.checkpoint}, {how}; scores and pictures are in {self.folder}")
        return record


def _identity(folder: Path) -> list:
    """What makes two evaluations say the same."""
    path = folder / "scores.json"
    record = read_json(path) if path.is_file() else {}
    return [[record.get(key) for key in IDENTITY], *record.get("rules", [])]
