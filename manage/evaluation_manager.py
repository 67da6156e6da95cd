"""Evaluation: whole photos at native size, one pass, every level; scores, tables and pictures."""

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from manage.inference import Rows, chosen_amp, photo_named, rows_of_each, together
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


class Scored(NamedTuple):
    """A photo and its counts, on the network's device."""

    sample: Sample
    leaves: Tensor  # (H, W), by the first rule
    matrix: Tensor  # (N, N) of label and leaf, by the first rule
    maps: report.MapSampler | None


class Scorer:
    """Photos through the network and into counts: what validation in training and evaluate.py share.

    Each rule has a meter. Violations and the calibration of roots depend on no rule and are counted by the first.
    """

    def __init__(
        self,
        network: nn.Module,
        hierarchy: Hierarchy,
        decodings: Sequence[Decoding],
        criterion: str | dict[str, float],
        how: dict[str, Any],
        with_maps: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.network, self.hierarchy, self.decodings, self.how = network.eval(), hierarchy, decodings, how
        self.with_maps, self.loss, device = with_maps, loss, next(network.parameters()).device
        own_rule = default_decode(criterion)  # of the probabilities, whatever rule decodes
        self.meters = [LevelScores(hierarchy, device, own_rule) for _ in decodings]
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=device)  # over known pixels, and their number

    @torch.inference_mode()
    def photos(
        self, loader: ValLoader, tolerance: Tolerance, bar: tqdm, between: Callable[[], None] = lambda: None
    ) -> Iterator[Scored]:
        """Every readable photo of the loader, counted; `between` is called before each photo."""
        rounds = distributed.largest(len(loader))

        def readable() -> Iterator[Sample]:
            for sample in loader:
                between()
                bar.update()
                if tolerance.check(sample.index, sample.fault):
                    yield sample

        for group in together(readable(), self.network, self.how):
            rows_of = rows_of_each(self.network, group, **self.how)
            for sample in group:
                with photo_named(tolerance.ids[sample.index]):
                    scored = self._count(sample, next(rows_of))
                yield scored
        for _ in range(rounds - len(loader)):  # processes may meet in `between`: all call it equally often
            between()
        bar.close()

    def _count(self, sample: Sample, bands: Rows) -> Scored:
        leaves, before = torch.empty_like(sample.labels), self.meters[0].matrix.clone()
        maps = report.MapSampler(sample.labels, self.hierarchy.num_nodes) if self.with_maps else None
        for rows, logits in bands:
            labels = sample.labels[None, rows]
            decided = [decoding(logits, self.hierarchy) for decoding in self.decodings]
            for i, meter in enumerate(self.meters):
                meter.update(decided[i], labels, None if i else logits)
            leaves[rows] = decided[0][0]
            if maps:
                maps.add(rows, logits[0])
            if self.loss:
                known = (labels != self.hierarchy.ignore_index).sum()
                self.loss_sum += torch.stack([self.loss(logits, labels) * known, known])
        return Scored(sample, leaves, self.meters[0].matrix - before, maps)

    def results(self) -> list[dict[str, Any]]:
        """The scores by each rule, of the photos of all processes."""
        distributed.sum_over_processes([*(t for meter in self.meters for t in meter.tensors()), self.loss_sum])
        first = self.meters[0]
        for meter in self.meters[1:]:
            meter.violations, meter.calibration[1:] = first.violations, first.calibration[1:]
        return [meter.compute() for meter in self.meters]


# --- validation in training ---
@dataclass
class Validation:
    """What a validation in training shows: scores by name, IoU by (level, class, value), and pictures."""

    scores: dict[str, float | None]
    per_class: list[tuple[int, str, float | None]]
    pictures: dict[str, np.ndarray]


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
    how, pictures = {"amp": config.amp}, {}
    scorer = Scorer(network, hierarchy, [Decoding.of(config)], config.criterion, how, loss=criterion)
    for sample, leaves, *_ in scorer.photos(loader, tolerance, bar, between):
        if len(pictures) < N_PICTURES:
            pictures[loader.photos.files[sample.index].photo.stem] = _sheet(sample, leaves, hierarchy)
    result = scorer.results()[0]
    scores = summary(result) | {"loss_val": float(scorer.loss_sum[0] / scorer.loss_sum[1].clamp(min=1))}
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
        distributed.start(self.device, config.timeout_minutes)
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
        self.loader = ValLoader(config, self.hierarchy, self.ids, self.device)
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
        began, counted, drawing = time.monotonic(), {}, deque[Future]()
        parts = (self.predictor.network, self.hierarchy, self.decodings, self.trained_with.criterion, self.how)
        scorer = Scorer(*parts, with_maps=self.options.pictures)
        bar = progress(total=len(self.loader), desc="evaluate", disable=not distributed.is_main())
        with ThreadPoolExecutor(2) as drawers:
            for sample, leaves, matrix, maps in scorer.photos(self.loader, self.tolerance, bar):
                counted[sample.index] = matrix.cpu(), tuple(leaves.shape)
                if maps:
                    drawing.append(drawers.submit(self._draw, sample.index, leaves.cpu().numpy(), maps.maps(leaves)))
                while len(drawing) > DRAWN_AT_ONCE:  # an error while drawing is raised here
                    drawing.popleft().result()
        for job in drawing:
            job.result()
        counted, faults = (
            {key: value for part in distributed.gather(found) for key, value in part.items()}
            for found in (counted, self.tolerance.faults)
        )
        if len(counted) + len(faults) != len(self.ids):
            raise RuntimeError(f"saw {len(counted)} of {len(self.ids)} photos")
        results = dict(zip((decoding.rule for decoding in self.decodings), scorer.results(), strict=True))
        return distributed.on_main_only(self._write, results, counted, faults, time.monotonic() - began) or {}

    def _draw(self, index: int, leaves: np.ndarray, maps: Sequence[np.ndarray]) -> None:
        """Per level an indexed PNG, an overlay, and the report's files."""
        folder, name = self.unfinished / "pictures", self.ids[index]
        with photo_named(name):
            photo = np.asarray(read_photo(self.loader.photos.files[index].photo))  # as taken, not as it was fed
            visualize.write_maps(folder, name, photo, leaves, self.hierarchy)
            report.write_photo(folder / "report", name, photo, maps)

    @property
    def _is_own(self) -> bool:
        """The checkpoint lies in the experiment's folder: it is not one of another experiment, given by its path."""
        return self.checkpoint.parent.resolve().is_relative_to(self.config.checkpoints_dir.resolve())

    def _name(self) -> str:
        """The checkpoint's name, and what the command line says otherwise."""
        options, stem = self.options, self.checkpoint.stem
        names = [stem if self._is_own else f"{self.trained_with.exp_name}-{stem}"]
        names += [options.limit and f"limit{options.limit}", options.decode, options.root_bias is not None and "bias"]
        return "-".join(filter(None, [*names, options.tta, options.tile and f"tile{options.tile}"]))

    def _make_folder(self) -> None:
        shutil.rmtree(self.unfinished, ignore_errors=True)  # of an evaluation that was stopped
        self.unfinished.mkdir(parents=True)

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

    def _write(self, results: dict, counted: dict[int, tuple], faults: dict, seconds: float) -> dict:
        record, order = self._record(results, len(counted), faults, seconds), sorted(counted)
        ids, n = np.array([self.ids[index] for index in order]), self.hierarchy.num_nodes
        matrices = np.array([counted[index][0].numpy() for index in order], np.int32).reshape(-1, n, n)
        write_json(record, self.unfinished / "scores.json")
        write_csv(results, self.unfinished / "scores.csv")
        np.savez_compressed(self.unfinished / "photos.npz", ids=ids, **{record["decode"]: matrices})
        if self.options.pictures:
            lines = [report.photo_line(self.ids[i], *counted[i], self.hierarchy) for i in order]
            report.write_report(self.unfinished, record, lines, self.hierarchy)
        self._move_into_place()
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
    try:
        record = read_json(folder / "scores.json")
        return [[record.get(key) for key in IDENTITY], *record.get("rules", [])]
    except (UserError, AttributeError):  # none, or damaged
        return []
