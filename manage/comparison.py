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
import torch

from configs.config import REPOSITORY, RESUMABLE_CHANGES
from utils.errors import UserError
from utils.files import read_json
from utils.hierarchy import Hierarchy
from utils.metrics import level_mious, severity

RESAMPLES = 10_000  # so that p can be small enough for a hundred comparisons
SEVERITY = "mistake_severity"  # where less is better
CONFIDENCE = 0.95
FEWEST_PHOTOS = 20  # with less, a bootstrap interval is too narrow to be believed

# Keys that do not change what a run computes. How it is decoded does change its scores.
NOT_COMPARED = {"exp_name", "seed", *RESUMABLE_CHANGES} - {"decode", "root_bias", "tta"}


@dataclass(frozen=True)
class Experiment:
    """One evaluated experiment, as its folder holds it."""

    folder: Path
    config: dict[str, Any]  # what it was trained with and how it was decoded; and `processes`, which scale the batch
    record: dict[str, Any]  # scores.json
    starts: list[dict[str, Any]]  # environment.json, one record for each start and resume
    ids: list[str]
    matrices: np.ndarray  # (P, N, N) int32: label, predicted leaf

    @property
    def name(self) -> str:
        return self.config["exp_name"]

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
    experiments: list[Experiment]

    def values(self, score: str) -> dict[int, float | None]:
        """The score of each seed."""
        return {e.config["seed"]: e.record["scores"].get(score) for e in self.experiments}


@dataclass(frozen=True)
class Difference:
    """Score of `second` minus score of `first`: with its interval over photos, which allows for all comparisons."""

    first: str
    second: str
    score: str
    value: float
    by_seed: dict[int, float]  # of the seeds that both have
    photos: int
    low: float = math.nan
    high: float = math.nan
    p: float = 1.0  # two-sided, of the bootstrap, adjusted for the number of comparisons

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


@dataclass(frozen=True)
class Comparison:
    """All that a report needs."""

    groups: list[Group]
    differing: dict[str, list[Any]]  # config key -> value of each group
    differences: list[Difference]  # of every group from the first

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
    scored, starts = folder / "evaluation" / evaluation, folder / "environment.json"
    if not (scored / "scores.json").is_file() or not (scored / "photos.npz").is_file():
        raise UserError(
            f"{folder}: has no evaluation {evaluation!r}. Make it: python evaluate.py --cfg "
            f"{folder}/configs/{folder.name}.json --checkpoint {evaluation} --no-pictures"
        )
    record, starts = read_json(scored / "scores.json"), read_json(starts) if starts.is_file() else []
    try:
        with np.load(scored / "photos.npz", allow_pickle=False) as photos:
            ids, matrices = photos["ids"].tolist(), photos[record["decode"]]
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{scored}/photos.npz: damaged ({error}); run evaluate.py again") from None
    config = record["config"] | {key: record[key] for key in ("decode", "root_bias", "tta", "tile") if key in record}
    config["processes"] = list(dict.fromkeys(start.get("processes", 1) for start in starts)) or [1]
    return Experiment(folder, config, record, starts, ids, matrices)


def compare(experiments: Sequence[Experiment], resamples: int = RESAMPLES, names: Mapping | None = None) -> Comparison:
    """Groups experiments by config and compares every group with the first, at every level and in severity.

    `names` says what a group is called, by its first experiment; without, it bears that one's name.
    Raises: UserError when they were not scored on the same photos, labels and tree.
    """
    check_comparable(experiments)
    groups, differing = group_by_config(experiments, names or {})
    samples = [bootstrap(group.experiments, resamples) for group in groups]
    scores = [*(f"mIoU{level}" for level in range(1, experiments[0].hierarchy.num_levels + 1)), SEVERITY]
    found = [
        (difference(groups[0], group, score), column)
        for group, drawn in zip(groups[1:], samples[1:], strict=True)
        for score, column in zip(scores, (drawn - samples[0]).T, strict=True)
    ]
    return Comparison(groups, differing, allow_for_many(found))


def check_comparable(experiments: Sequence[Experiment]) -> None:
    """Raises: UserError naming what differs: tree, photos or labels."""
    first = experiments[0]
    for other in experiments[1:]:
        pair = f"{first.name} and {other.name} cannot be compared"
        if other.hierarchy.fingerprint != first.hierarchy.fingerprint:
            raise UserError(f"{pair}: their trees differ ({first.hierarchy.name!r} and {other.hierarchy.name!r})")
        if other.ids != first.ids or (other.matrices.sum(axis=2) != first.matrices.sum(axis=2)).any():
            counts = f"{len(first.ids)} and {len(other.ids)}"
            raise UserError(f"{pair}: they were scored on other photos ({counts}) or labels; evaluate both again")


def group_by_config(
    experiments: Sequence[Experiment], names: Mapping[str, str]
) -> tuple[list[Group], dict[str, list[Any]]]:
    """The groups, in the order given, and the config keys in which they differ."""
    by_config: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        by_config.setdefault(json.dumps(experiment.compared, sort_keys=True), []).append(experiment)
    sets = []
    for members in by_config.values():  # a seed that ran twice is no other seed
        is_repeat = len({member.config["seed"] for member in members}) < len(members)
        sets += [[member] for member in members] if is_repeat else [members]
    values = [members[0].compared for members in sets]
    differing = {key: [value.get(key) for value in values] for key in dict.fromkeys(itertools.chain(*values))}
    differing = {key: column for key, column in differing.items() if any(value != column[0] for value in column)}
    return [Group(names.get(members[0].name, members[0].name), members) for members in sets], differing


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
        sums = torch.from_numpy(counts @ e.matrices.reshape(photos, -1).astype(np.float64)).view(-1, nodes, nodes)
        total = total + torch.column_stack([level_mious(sums, h), severity(sums, h)]).numpy()
    return total / len(experiments)


def p_value(samples: np.ndarray) -> float:
    """How often a resample contradicts the sign of the difference, two-sided; never 0. 1 where it is not defined."""
    if not np.isfinite(samples).all():
        return 1.0
    beyond = min((samples <= 0).sum(), (samples >= 0).sum())
    return min(1.0, 2 * (1 + float(beyond)) / (1 + len(samples)))


def allow_for_many(found: Sequence[tuple[Difference, np.ndarray]]) -> list[Difference]:
    """All differences, each given with its resamples, with intervals and p adjusted for their number.

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


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (n - 1); NaN where they are not defined."""
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if known else math.nan
    return mean, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan


def difference(first: Group, second: Group, score: str) -> Difference:
    """Without an interval yet."""
    ours, theirs = first.values(score), second.values(score)
    value = mean_and_spread([*theirs.values()])[0] - mean_and_spread([*ours.values()])[0]
    paired = {s: theirs[s] - ours[s] for s in ours if None not in (ours[s], theirs.get(s))}
    return Difference(first.label, second.label, score, value, paired, len(first.experiments[0].ids))
