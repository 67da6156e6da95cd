"""Scores at every level, from one confusion matrix: count over the data set, divide once at the end.

    meter = LevelScores(h, device)
    meter.update(leaf, labels, logits)          # nothing leaves the device
    scores = meter.compute()                    # {"mIoU1": .., "mIoU1_with_background": .., "levels": [..], ..}

The matrix counts (label, predicted leaf) pairs. Rows are any node, so that a pixel labelled at an inner node
counts at its own level and above; each level's matrix is a collapse of rows and columns.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from utils.hierarchy import Hierarchy


def confusion(leaf: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    """Counts of (label, predicted leaf) over the pixels that are not void. No synchronisation with the device.

    Shape: two integer maps of the same shape -> (N, N) int64.
    """
    if leaf.shape != labels.shape:
        raise ValueError(f"prediction {tuple(leaf.shape)} and labels {tuple(labels.shape)} differ in shape")
    n = h.num_nodes
    if leaf.device.type == "cpu" and leaf.numel() and int(leaf.max()) >= n:
        raise ValueError(f"prediction holds {int(leaf.max())}; the tree {h.name!r} has nodes 0 to {n - 1}")
    pair = (h.index_of(labels) * n).add_(leaf).flatten()
    counts = torch.zeros((n + 1) * n, dtype=torch.int64, device=leaf.device)
    # not bincount: on a GPU that waits for the largest value
    counts.scatter_add_(0, pair, counts.new_ones(()).expand_as(pair))
    return counts.view(n + 1, n)[:n]  # the last row is void


def level_confusions(matrix: Tensor, h: Hierarchy) -> list[Tensor]:
    """The confusion matrix of each level's classes. Shape: (N, N) -> L times (classes, classes), int64."""
    matrix = matrix.cpu()
    return [members.t() @ matrix @ members for members in _memberships(h)]


def _memberships(h: Hierarchy) -> list[Tensor]:
    """Per level, 1 where a node belongs to a class; labels above the level belong to none.

    Shape: L times (N, classes) int64.
    """

    def make(level: int) -> Tensor:
        nodes, classes = torch.tensor(h.level_tables[level]), torch.tensor(h.level_classes[level])
        return nodes.unsqueeze(1) == classes

    return [
        h.cached(("membership", level), "cpu", torch.int64, lambda level=level: make(level))
        for level in range(h.num_levels)
    ]


def scores_from_confusion(matrix: Tensor, h: Hierarchy) -> dict[str, Any]:
    """All scores that follow from an (N, N) matrix of counts, as plain JSON types; None where undefined.

    A class absent from both truth and prediction has no IoU and is left out of the mean. `mIoU1` leaves out the
    classes that the tree marks as background, `mIoU1_with_background` does not.
    """
    levels = [_level_scores(counts, level, h) for level, counts in enumerate(level_confusions(matrix, h))]
    scores: dict[str, Any] = {}
    for level in levels:
        scores[f"mIoU{level['level']}"] = level["mIoU"]
        scores[f"mIoU{level['level']}_with_background"] = level["mIoU_with_background"]
    return scores | {"pixel_accuracy": levels[0]["pixel_accuracy"], "levels": levels}


def _level_scores(counts: Tensor, level: int, h: Hierarchy) -> dict[str, Any]:
    classes = h.level_classes[level]
    ious = dict(zip(classes, _ious(counts), strict=True))
    pixels = int(counts.sum())
    return {
        "level": level + 1,
        "name": h.level_names[level],
        "mIoU": _mean(iou for v, iou in ious.items() if v not in h.background),
        "mIoU_with_background": _mean(ious.values()),
        "pixel_accuracy": int(counts.trace()) / pixels if pixels else None,
        "pixels": pixels,
        "IoU": {h.names[v]: iou for v, iou in ious.items()},
        "absent": [h.names[v] for v, iou in ious.items() if iou is None],
        "classes": [h.names[v] for v in classes],
        "confusion": counts.tolist(),
    }


def _ious(counts: Tensor) -> list[float | None]:
    """TP / (TP + FP + FN) of each class, None where that is 0 / 0."""
    hits = counts.diagonal()
    unions = counts.sum(0) + counts.sum(1) - hits
    return [hit / union if union else None for hit, union in zip(hits.tolist(), unions.tolist(), strict=True)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class LevelScores:
    """Counts over a data set and what follows from them. Counts add up: over batches, meters and devices."""

    def __init__(self, h: Hierarchy, device: torch.device | str = "cpu") -> None:
        self.h = h
        self.matrix = torch.zeros(h.num_nodes, h.num_nodes, dtype=torch.int64, device=device)
        self.violations = torch.zeros(2, dtype=torch.int64, device=device)  # violated edges, pixels looked at

    def update(self, leaf: Tensor, labels: Tensor, logits: Tensor | None = None) -> Tensor:
        """Adds a batch and returns its (N, N) matrix. Violations are counted where logits are given.

        Shape: leaf and labels (B, H, W), logits (B, N, H, W).
        """
        matrix = confusion(leaf, labels, self.h)
        self.matrix += matrix
        if logits is not None:
            for sample, label in zip(logits, labels, strict=True):
                self.violations += _violations(sample, label, self.h)
        return matrix

    def compute(self) -> dict[str, Any]:
        """See `scores_from_confusion`; and `violation_rate`, the share of (labelled pixel, edge) pairs with
        s_child > 0.5 >= s_parent, None without logits. The one point that waits for the device.
        """
        violated, pixels = self.violations.tolist()
        pairs = pixels * len(self.h.edges)
        return scores_from_confusion(self.matrix, self.h) | {"violation_rate": violated / pairs if pairs else None}

    def tensors(self) -> list[Tensor]:
        """The counts themselves, int64: several processes sum them in place with all_reduce."""
        return [self.matrix, self.violations]


@torch.no_grad()
def _violations(logits: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    """(edges where the child is above 0.5 and its parent is not, labelled pixels), over labelled pixels.

    Shape: (N, H, W), (H, W) -> (2,) int64.
    """
    labelled = labels != h.ignore_index
    above = logits > 0  # s > 0.5
    parents, children = h.edge_index(logits.device)
    violated = above.index_select(0, children) > above.index_select(0, parents)
    return torch.stack([violated.logical_and_(labelled).sum(), labelled.sum()])
