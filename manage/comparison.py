"""Experiments side by side: which belong together, their scores, and whether a difference is more than chance.

Two kinds of chance are kept apart. Another draw of val photos: photos are resampled with replacement, the same for
all experiments, and each resample's confusion matrices are summed and scored anew (a paired bootstrap). Another
seed: experiments that differ in nothing else form a group, and its spread is shown beside the interval. Who makes
many comparisons finds something by chance, so their number is allowed for (Holm).
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs.config import REPOSITORY, RESUMABLE_CHANGES
from utils.errors import UserError
from utils.files import read_json
from utils.hierarchy import Hierarchy
from utils.metrics import severities

RESAMPLES = 10_000  # so that p can be small enough for a hundred comparisons
SEVERITY = "mistake_severity"  # where less is better
CONFIDENCE = 0.95
FEWEST_PHOTOS = 20  # with less, a bootstrap interval is too narrow to be believed

# Keys that do not change what a run computes. How it is decoded does change its scores.
NOT_COMPARED = {"exp_name", "seed", *RESUMABLE_CHANGES} - {"decode", "root_bias"}


@dataclass(frozen=True)
class Experiment:
    """One evaluated experiment, as its folder holds it."""

    folder: Path
    config: dict[str, Any]  # what it was trained with and how it was decoded; and `processes`, which scale the batch
    record: dict[str, Any]  # scores.json
    curves: list[dict[str, Any]]  # metrics.jsonl, one record an epoch
    starts: list[dict[str, Any]]  # environment.json, one record for each start and resume
    ids: list[str]
    matrices: np.ndarray  # (P, N, N) int32: label, predicted leaf

    @property
    def name(self) -> str:
        return self.config["exp_name"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @cached_property
    def hierarchy(self) -> Hierarchy:
        return Hierarchy.from_dict(self.record["tree"], f"{self.folder}, its tree")

    @property
    def compared(self) -> dict[str, Any]:
        """What two seeds of one config have in common."""
        return {key: value for key, value in self.config.items() if key not in NOT_COMPARED}

    def said(self, key: str) -> str:
        """What the records of every start, resume and the evaluation say of `key` (such as commit), each value once."""
        return ", ".join(dict.fromkeys(str(record[key]) for record in [*self.starts, self.record["environment"]]))


@dataclass(frozen=True)
class Group:
    """Experiments that differ only in their seed."""

    label: str
    experiments: tuple[Experiment, ...]

    @property
    def seeds(self) -> list[int]:
        return [experiment.seed for experiment in self.experiments]

    def values(self, name: str) -> list[float | None]:
        return [experiment.record["scores"].get(name) for experiment in self.experiments]


@dataclass(frozen=True)
class Difference:
    """Score of `second` minus score of `first`: with its interval over photos, which allows for all comparisons."""

    first: str
    second: str
    score: str
    title: str  # the score, and the level's name
    value: float
    low: float
    high: float
    by_seed: dict[int, float]  # of the seeds that both have
    photos: int
    p: float  # two-sided, of the bootstrap, adjusted for the number of comparisons

    @property
    def verdict(self) -> str:
        """better, worse, or why nothing can be said."""
        if self.photos < FEWEST_PHOTOS or not all(map(math.isfinite, (self.value, self.low, self.high))):
            return "too few photos to tell"
        if self.low <= 0 <= self.high or self.p > 1 - CONFIDENCE:
            return "no evidence of a difference"
        if any(value * self.value <= 0 for value in self.by_seed.values()):
            return "no evidence of a difference"  # more than the photos, less than the seeds
        return "better" if (self.value > 0) != (self.score == SEVERITY) else "worse"

    def shown(self, value: float) -> str:
        """A difference with its sign: in points, which are hundredths; of the severity as it is."""
        return f"{value:+.3f}" if self.score == SEVERITY else f"{100 * value:+.2f}"

    @property
    def sentence(self) -> str:
        """The verdict with its numbers."""
        agreeing = sum(value * self.value > 0 for value in self.by_seed.values())
        seeds = f"{agreeing} of {len(self.by_seed)} seeds agree in sign"
        if len(self.by_seed) < 2:
            seeds = "not two seeds in common, so the seeds' part in it is not known"
        return (
            f"{self.title}, {self.second} against {self.first}: {self.verdict}, {self.shown(self.value)} (interval "
            f"over photos {self.shown(self.low)} to {self.shown(self.high)}; p {self.p:.2g}; {seeds})."
        )


@dataclass(frozen=True)
class Comparison:
    """All that a report needs."""

    groups: list[Group]
    differing: dict[str, list[Any]]  # config key -> value of each group
    differences: list[Difference]  # of every group from the first

    @property
    def hierarchy(self) -> Hierarchy:
        return self.groups[0].experiments[0].hierarchy

    @property
    def experiments(self) -> list[Experiment]:
        return [experiment for group in self.groups for experiment in group.experiments]


def load_experiment(name: str | Path, evaluation: str = "best") -> Experiment:
    """An experiment by folder, or by name under experiments/, as it was evaluated.

    Raises: UserError for a folder that is no experiment, an evaluation that is missing or damaged.
    """
    places = [Path(name), REPOSITORY / "experiments" / name]
    folder = next((place.resolve() for place in places if (place / "configs").is_dir()), None)
    if folder is None:
        raise UserError(f"{name}: no such experiment (looked for {places[0]} and {places[1]}, with configs/ inside)")
    scored, curves, starts = folder / "evaluation" / evaluation, folder / "metrics.jsonl", folder / "environment.json"
    if not (scored / "scores.json").is_file() or not (scored / "photos.npz").is_file():
        there = sorted(path.name for path in scored.parent.glob("*/")) or ["nothing"]
        raise UserError(
            f"{folder}: has no evaluation {evaluation!r} (evaluation/ holds {', '.join(there)}). Make it: python "
            f"evaluate.py --cfg {folder}/configs/{folder.name}.json --checkpoint {evaluation} --no-pictures"
        )
    record, starts = read_json(scored / "scores.json"), read_json(starts) if starts.is_file() else []
    try:
        with np.load(scored / "photos.npz", allow_pickle=False) as photos:
            ids, matrices = photos["ids"].tolist(), photos[record["decode"]]
        lines = curves.read_text(encoding="utf-8").splitlines() if curves.is_file() else []
        curves = [json.loads(line) for line in lines]
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{scored}/photos.npz or {curves}: damaged ({error}); run evaluate.py again") from None
    processes = list(dict.fromkeys(start.get("processes", 1) for start in starts)) or [1]
    config = record["config"] | {key: record[key] for key in ("decode", "root_bias")}
    config["processes"] = processes[0] if len(processes) == 1 else processes
    return Experiment(folder, config, record, curves, starts, ids, matrices)


def compare(experiments: Sequence[Experiment], resamples: int = RESAMPLES, names: Mapping | None = None) -> Comparison:
    """Groups experiments by config and compares every group with the first, at every level and in severity.

    `names` says what a group is called, by an experiment in it; without, it is what tells the groups apart.
    Raises: UserError when they were not scored on the same photos, labels and tree.
    """
    check_comparable(experiments)
    (first, *others), differing = group_by_config(experiments, names or {})
    differences: list[tuple[Difference, np.ndarray]] = []
    if others:
        baseline = bootstrap(first.experiments, resamples)
        for group in others:
            differences += _differences(first, group, bootstrap(group.experiments, resamples) - baseline)
    return Comparison([first, *others], differing, allow_for_many(differences))


def check_comparable(experiments: Sequence[Experiment]) -> None:
    """Raises: UserError naming what differs: the folder given twice, tree, photos or labels."""
    first = experiments[0]
    for number, other in enumerate(experiments[1:], start=1):
        pair = f"{first.name} and {other.name} cannot be compared"
        if other.folder in [experiment.folder for experiment in experiments[:number]]:
            raise UserError(f"{other.folder}: is given twice")
        if other.hierarchy.fingerprint != first.hierarchy.fingerprint:
            raise UserError(f"{pair}: their trees differ ({first.hierarchy.name!r} and {other.hierarchy.name!r})")
        if other.ids != first.ids:
            alone = sorted(set(first.ids) ^ set(other.ids))
            example = f" (such as {alone[0]}, in one of them only)" if alone else " (in another order)"
            raise UserError(
                f"{pair}: they were scored on other photos, {len(first.ids)} and {len(other.ids)}{example}; "
                "evaluate both on the same val set"
            )
        changed = (other.matrices.sum(axis=2) != first.matrices.sum(axis=2)).any(axis=1)
        if changed.any():
            raise UserError(
                f"{pair}: the labels of {int(changed.sum())} photos differ (the first: "
                f"{first.ids[int(changed.argmax())]}); evaluate both again on the same label maps"
            )


def group_by_config(
    experiments: Sequence[Experiment], names: Mapping[str, str]
) -> tuple[list[Group], dict[str, list[Any]]]:
    """The groups, in the order given, and the config keys in which they differ."""
    by_config: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        by_config.setdefault(json.dumps(experiment.compared, sort_keys=True), []).append(experiment)
    sets = []
    for members in by_config.values():  # a seed that ran twice is no other seed
        is_repeat = len({member.seed for member in members}) < len(members)
        sets += [[member] for member in members] if is_repeat else [members]
    values = [members[0].compared for members in sets]
    differing = {key: [value.get(key) for value in values] for key in dict.fromkeys(itertools.chain(*values))}
    differing = {key: column for key, column in differing.items() if any(value != column[0] for value in column)}
    labels = [criterion_name(value["criterion"]) for value in values]
    for key, column in differing.items():
        if key != "criterion" and len(set(labels)) < len(labels):
            labels = [f"{label}, {key} {json.dumps(value)}" for label, value in zip(labels, column, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [members[0].name for members in sets]
    labels = [names.get(members[0].name, label) for members, label in zip(sets, labels, strict=True)]
    return [Group(label, tuple(members)) for label, members in zip(labels, sets, strict=True)], differing


def criterion_name(criterion: str | Mapping[str, float]) -> str:
    """`tree_min + 0.5 bce` for {"tree_min": 1.0, "bce": 0.5}."""
    if isinstance(criterion, str):
        return criterion
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in criterion.items())


def level_mious(matrices: np.ndarray, h: Hierarchy) -> np.ndarray:
    """mIoU without background of each level, NaN where no class is there. Shape: (..., N, N) -> (..., L)."""
    means = []
    for table, classes in zip(h.level_tables, h.level_classes, strict=True):
        members = (np.array(table)[:, None] == np.array(classes)).astype(matrices.dtype)  # (N, K)
        counts = members.T @ matrices @ members  # (..., K, K)
        hits = counts.diagonal(axis1=-2, axis2=-1)
        unions = counts.sum(axis=-1) + counts.sum(axis=-2) - hits
        counted = (unions > 0) & np.array([v not in h.background for v in classes])
        ious = np.where(counted, hits / np.maximum(unions, 1), 0)
        present = counted.sum(axis=-1)
        means.append(np.where(present > 0, ious.sum(axis=-1) / np.maximum(present, 1), np.nan))
    return np.stack(means, axis=-1)


def severity(matrices: np.ndarray, h: Hierarchy) -> np.ndarray:
    """Mistake severity (utils/metrics.py), NaN where nothing is wrong. Shape: (..., N, N) -> (...)."""
    heights = severities(h).numpy()
    wrong = matrices[..., heights > 0].sum(axis=-1)
    return np.where(wrong > 0, (matrices * heights).sum(axis=(-2, -1)) / np.maximum(wrong, 1), np.nan)


def bootstrap(experiments: Sequence[Experiment], resamples: int, seed: int = 0) -> np.ndarray:
    """Mean over the experiments of each level's mIoU, and of the severity, in each resample of the photos.

    Exact, since the sums stay below 2^53; the resamples are the same for all experiments with as many photos.
    Shape: -> (R, L + 1).
    """
    photos, nodes, _ = experiments[0].matrices.shape
    h, total = experiments[0].hierarchy, 0
    counts = np.random.default_rng(seed).multinomial(photos, np.full(photos, 1 / photos), size=resamples)  # (R, P)
    counts = counts.astype(np.float64)
    for e in experiments:
        sums = (counts @ e.matrices.reshape(photos, -1).astype(np.float64)).reshape(-1, nodes, nodes)
        total = total + np.column_stack([level_mious(sums, h), severity(sums, h)])
    return total / len(experiments)


def p_value(samples: np.ndarray) -> float:
    """How often a resample contradicts the sign of the difference, two-sided; never 0. 1 where it is not defined."""
    if not np.isfinite(samples).all():
        return 1.0
    beyond = min((samples <= 0).sum(), (samples >= 0).sum())
    return min(1.0, 2 * (1 + float(beyond)) / (1 + len(samples)))


def allow_for_many(found: Sequence[tuple[Difference, np.ndarray]]) -> list[Difference]:
    """Intervals and p of all differences, each given with its resamples, adjusted for their number.

    The smallest of m p-values is held against 1/m of the doubt that CONFIDENCE leaves, the next against 1/(m - 1) of
    it, and so on; each interval leaves out as much, so that it agrees with its p.
    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    ps = [p_value(samples) for _, samples in found]
    adjusted, largest = [difference for difference, _ in found], 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        left = len(ps) - rank
        largest = max(largest, min(1.0, ps[i] * left))
        doubt = 100 * (1 - CONFIDENCE) / left
        low, high = np.percentile(found[i][1], [doubt / 2, 100 - doubt / 2])
        adjusted[i] = dataclasses.replace(adjusted[i], low=float(low), high=float(high), p=largest)
    return adjusted


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over seeds (n - 1); None where they are not defined."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def unit(score: str) -> int:
    """Scores are shares, shown in percent; the mistake severity is a height in the tree."""
    return 1 if score == SEVERITY else 100


def _differences(first: Group, second: Group, samples: np.ndarray) -> list[tuple[Difference, np.ndarray]]:
    """One for each score, with its resamples and without an interval yet. Shape: samples (R, L + 1)."""
    level_names, photos = first.experiments[0].hierarchy.level_names, len(first.experiments[0].ids)
    titles = {f"mIoU{n}": f"mIoU{n} ({name})" for n, name in enumerate(level_names, start=1)} | {SEVERITY: "severity"}
    differences = []
    for (score, title), column in zip(titles.items(), samples.T, strict=True):
        ours, theirs = (dict(zip(g.seeds, g.values(score), strict=True)) for g in (first, second))
        a, b = mean_and_spread(list(ours.values()))[0], mean_and_spread(list(theirs.values()))[0]
        value = math.nan if a is None or b is None else b - a
        paired = {s: theirs[s] - ours[s] for s in ours if None not in (ours[s], theirs.get(s))}
        bare = Difference(first.label, second.label, score, title, value, math.nan, math.nan, paired, photos, 1.0)
        differences.append((bare, column))
    return differences
