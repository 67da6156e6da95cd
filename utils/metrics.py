"""Scores at every level, from one confusion matrix: count over the data set, divide once at the end.

    meter = LevelScores(h, device)
    meter.update(leaf, labels, logits)  # nothing leaves the device
    scores = meter.compute()                    # {"mIoU1": .., "mIoU1_with_background": .., "levels": [..], ..}

The matrix counts (label, predicted leaf) pairs. Rows are any node, so that a pixel labelled at an inner node
counts at its own level and above; each level's matrix is a collapse of rows and columns.

`mistake_severity` is the mean over wrong pixels of the height of the lowest node above label and answer: 0 for a leaf,
else the longest way down to one; above all roots stands one more. An answer below an inner label is right. `ECE_leaf`
and `ECE_<root>` are expected calibration errors: how far probabilities are from frequencies, in BINS equal bins, of
the answered leaf over pixels labelled with a leaf, and of each root over all.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from utils.decode import probabilities
from utils.hierarchy import Hierarchy

BINS = 15
UNITS = 2**16  # of a probability: whole numbers add up to the same sum in any order, on any number of processes


def confusion(leaf: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    """Counts of (label, predicted leaf) over the pixels that are not void. No synchronisation with the device.

    Shape: two integer maps of the same shape -> (N, N) int64.
    """
    if leaf.shape != labels.shape:
        raise ValueError(f"prediction {tuple(leaf.shape)} and labels {tuple(labels.shape)} differ in shape")
    n = h.num_nodes
    pair = (h.index_of(labels) * n).add_(leaf).flatten()
    counts = torch.zeros((n + 1) * n, dtype=torch.int64, device=leaf.device)
    counts.scatter_add_(0, pair, counts.new_ones(()).expand_as(pair))  # bincount would wait for a GPU
    return counts.view(n + 1, n)[:n]  # the last row is void


def level_confusions(matrix: Tensor, h: Hierarchy) -> list[Tensor]:
    """The confusion matrix of each level's classes. Shape: (N, N) -> L times (classes, classes), int64."""
    matrix, results = matrix.cpu(), []
    for table, classes in zip(h.level_tables, h.level_classes, strict=True):
        members = (torch.tensor(table).unsqueeze(1) == torch.tensor(classes)).long()  # labels above the level: none
        results.append(members.t() @ matrix @ members)
    return results


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
    heights, matrix = h.cached("severities", "cpu", torch.int64, lambda: severities(h)), matrix.cpu()
    wrong = int(matrix[heights > 0].sum())
    scores["pixel_accuracy"] = levels[0]["pixel_accuracy"]
    scores["mistake_severity"] = int((matrix * heights).sum()) / wrong if wrong else None
    return scores | {"levels": levels}


def severities(h: Hierarchy) -> Tensor:
    """The height at which label and answer meet, 0 where the answer is right. Shape: (N, N) int64."""
    heights = torch.zeros(h.num_nodes, h.num_nodes, dtype=torch.int64)
    for label, path in enumerate(h.paths):
        for leaf in h.leaves:
            shared = h.shared(label, leaf)
            if shared < len(path):
                heights[label, leaf] = h.heights[path[shared - 1]] if shared else h.num_levels
    return heights


def _level_scores(counts: Tensor, level: int, h: Hierarchy) -> dict[str, Any]:
    """IoU is TP / (TP + FP + FN), None where that is 0 / 0."""
    hits = counts.diagonal()
    unions = (counts.sum(0) + counts.sum(1) - hits).tolist()
    ious = [hit / union if union else None for hit, union in zip(hits.tolist(), unions, strict=True)]
    classes, pixels = h.level_classes[level], int(counts.sum())
    return {
        "level": level + 1,
        "name": h.level_names[level],
        "mIoU": _mean(iou for v, iou in zip(classes, ious, strict=True) if v not in h.background),
        "mIoU_with_background": _mean(ious),
        "pixel_accuracy": int(hits.sum()) / pixels if pixels else None,
        "pixels": pixels,
        "IoU": {h.names[v]: iou for v, iou in zip(classes, ious, strict=True)},
        "absent": [h.names[v] for v, iou in zip(classes, ious, strict=True) if iou is None],
        "classes": [h.names[v] for v in classes],
        "confusion": counts.tolist(),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class LevelScores:
    """Counts over a data set and what follows from them. Counts add up: over batches, meters and devices.

    `own_rule` is the decoding rule of the loss, which says what its probabilities are (`decode.probabilities`).
    """

    def __init__(self, h: Hierarchy, device: torch.device | str = "cpu", own_rule: str = "logit_sum") -> None:
        self.h, self.own_rule = h, own_rule
        self.matrix = torch.zeros(h.num_nodes, h.num_nodes, dtype=torch.int64, device=device)
        self.violations = torch.zeros(2, dtype=torch.int64, device=device)  # violated edges, pixels looked at
        # of the leaf and of each root, in each bin: pixels, hits, sum of probabilities in UNITS
        self.calibration = torch.zeros(1 + len(h.roots), 3, BINS, dtype=torch.int64, device=device)

    def update(self, leaf: Tensor, labels: Tensor, logits: Tensor | None = None) -> Tensor:
        """Adds a batch and returns its (N, N) matrix. Violations and calibration are counted where logits are given.

        Shape: leaf and labels (B, H, W), logits (B, N, H, W).
        """
        matrix = confusion(leaf, labels, self.h)
        self.matrix += matrix
        if logits is not None:
            for b in range(len(labels)):  # one by one: photos may be large
                self.violations += _violations(logits[b], labels[b], self.h)
                p = probabilities(self.own_rule, logits[b : b + 1], self.h)[0]
                self.calibration += _calibration(p, leaf[b], labels[b], self.h)
        return matrix

    def compute(self) -> dict[str, Any]:
        """See `scores_from_confusion`; and `violation_rate`, the share of (labelled pixel, edge) pairs with
        s_child > 0.5 >= s_parent, and calibration errors, None without logits. The one point that waits for the device.
        """
        violated, pixels = self.violations.tolist()
        rates = {"violation_rate": violated / pairs if (pairs := pixels * len(self.h.edges)) else None}
        names = ["leaf", *(self.h.names[v] for v in self.h.roots)]
        for name, (count, hits, units) in zip(names, self.calibration.cpu(), strict=True):
            gap = (
                hits - units.double() / UNITS
            ).abs().sum() / count.sum()  # |frequency - mean probability| of the bins
            rates[f"ECE_{name}"] = gap.item() if count.any() else None
        return scores_from_confusion(self.matrix, self.h) | rates

    def tensors(self) -> list[Tensor]:
        """The counts themselves, int64: several processes sum them in place with all_reduce."""
        return [self.matrix, self.violations, self.calibration]


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


@torch.no_grad()
def _calibration(p: Tensor, leaf: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    """Shape: probabilities (N, H, W), two maps (H, W) -> as `LevelScores.calibration`."""
    root, is_leaf = h.level_of(labels, h.num_levels - 1), h.level_of(labels, 0) != h.ignore_index
    rows = [(p.gather(0, leaf.long().unsqueeze(0))[0], leaf == labels, is_leaf)]
    rows += [(p[v], root == v, root != h.ignore_index) for v in h.roots]
    counts = torch.zeros(len(rows), 3, BINS, dtype=torch.int64, device=p.device)
    for row, (sure, hit, known) in zip(counts, rows, strict=True):
        sure = sure.nan_to_num().flatten()
        values = torch.stack([torch.ones_like(sure), hit.flatten().to(sure), (sure * UNITS).round()]).long()
        bins = (sure * BINS).long().clamp(max=BINS - 1)
        row.scatter_add_(1, bins.expand(3, -1), values * known.flatten())
    return counts
