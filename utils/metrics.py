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


def level_confusions(matrices: Tensor, h: Hierarchy) -> list[Tensor]:
    """The confusion matrices of each level's classes. Shape: (..., N, N) -> L times (..., classes, classes)."""
    results = []
    for table, classes in zip(h.level_tables, h.level_classes, strict=True):
        members = torch.tensor(table).unsqueeze(1) == torch.tensor(classes)  # labels above the level: none
        members = members.to(matrices.dtype)
        results.append(members.t() @ matrices @ members)
    return results


def level_ious(matrices: Tensor, h: Hierarchy) -> list[Tensor]:
    """TP / (TP + FP + FN) of each level's classes, NaN where that is 0 / 0.

    Shape: (..., N, N) -> L times (..., classes), float64.
    """
    results = []
    for counts in level_confusions(matrices, h):
        hits = counts.diagonal(dim1=-2, dim2=-1)
        results.append(hits.double() / (counts.sum(-1) + counts.sum(-2) - hits))
    return results


def level_mious(matrices: Tensor, h: Hierarchy) -> Tensor:
    """Each level's mean IoU without background, NaN where no class is there. Shape: (..., N, N) -> (..., L)."""
    counted = [torch.tensor([v not in h.background for v in classes]) for classes in h.level_classes]
    ious = level_ious(matrices, h)
    return torch.stack([level[..., those].nanmean(-1) for level, those in zip(ious, counted, strict=True)], -1)


def severity(matrices: Tensor, h: Hierarchy) -> Tensor:
    """`mistake_severity`, NaN where nothing is wrong. Shape: (..., N, N) -> (...), float64."""
    heights = h.cached("severities", "cpu", matrices.dtype, lambda: _severities(h))
    return (matrices * heights).sum((-2, -1)).double() / (matrices * (heights > 0)).sum((-2, -1))


def _severities(h: Hierarchy) -> Tensor:
    """The height at which label and answer meet, 0 where the answer is right. Shape: (N, N) int64."""
    heights = torch.zeros(h.num_nodes, h.num_nodes, dtype=torch.int64)
    for label, path in enumerate(h.paths):
        for leaf in h.leaves:
            shared = h.shared(label, leaf)
            if shared < len(path):
                heights[label, leaf] = h.heights[path[shared - 1]] if shared else h.num_levels
    return heights


def scores_from_confusion(matrix: Tensor, h: Hierarchy) -> dict[str, Any]:
    """All scores that follow from an (N, N) matrix of counts, as plain JSON types; None where undefined.

    A class absent from both truth and prediction has no IoU and is left out of the mean. `mIoU1` leaves out the
    classes that the tree marks as background, `mIoU1_with_background` does not.
    """
    matrix, levels, scores = matrix.cpu(), [], {}
    parts = zip(level_confusions(matrix, h), level_ious(matrix, h), level_mious(matrix, h), strict=True)
    for i, (counts, ious, mean) in enumerate(parts):
        names = [h.names[v] for v in h.level_classes[i]]
        level = {
            "level": i + 1,
            "name": h.level_names[i],
            "mIoU": _number(mean),
            "mIoU_with_background": _number(ious.nanmean()),
            "pixel_accuracy": _number(counts.diagonal().sum().double() / counts.sum()),
            "pixels": int(counts.sum()),
            "IoU": dict(zip(names, map(_number, ious), strict=True)),
            "absent": [name for name, iou in zip(names, ious, strict=True) if iou.isnan()],
            "classes": names,
            "confusion": counts.tolist(),
        }
        levels.append(level)
        scores |= {f"mIoU{i + 1}": level["mIoU"], f"mIoU{i + 1}_with_background": level["mIoU_with_background"]}
    scores["pixel_accuracy"] = levels[0]["pixel_accuracy"]
    return scores | {"mistake_severity": _number(severity(matrix, h)), "levels": levels}


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


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
        roots = [self.h.names[v] for v in self.h.roots]
        names = ["leaf", *("root leaf" if name == "leaf" else name for name in roots)]
        for name, (count, hits, units) in zip(names, self.calibration.cpu(), strict=True):
            far = (hits - units.double() / UNITS).abs()  # of each bin, its frequency from its mean probability
            rates[f"ECE_{name}"] = _number(far.sum() / count.sum())
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
