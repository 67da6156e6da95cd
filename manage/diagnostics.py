"""What a loss tells a network, node by node: gradients, violations of the tree, calibration.

All are sums over the labelled pixels of any number of batches; `summary` divides once at the end.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.hierarchy import Hierarchy
from utils.losses import Criterion

BINS = 10


class Diagnosis:
    """Sums over pixels for one network and several criteria.

    A gradient here is that of a pixel's own loss by a node's logit, before it is divided by the number of pixels.
    It is looked at apart where the node is on the label's path ("positive") and where it is on none ("negative").
    """

    def __init__(self, h: Hierarchy, criteria: Mapping[str, Criterion]) -> None:
        self.h, self.criteria = h, criteria
        self.gradients = {name: torch.zeros(2, 2, h.num_nodes, dtype=torch.float64) for name in criteria}
        self.pixels = torch.zeros(2, h.num_nodes, dtype=torch.float64)  # positive, negative
        self.violations = torch.zeros(len(h.edges), dtype=torch.float64)
        self.labelled = 0
        self.bins = torch.zeros(3, h.num_nodes, BINS, dtype=torch.float64)  # pixels, sum of scores, positive pixels

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch. Shape: (B, N, H, W), (B, H, W)."""
        logits = logits.detach().float().cpu()
        labels = labels.cpu()
        signs = self.h.signs("cpu")[:, self.h.index_of(labels).flatten()]  # (N, P)
        is_label = labels.flatten() != self.h.ignore_index
        self.labelled += int(is_label.sum())
        self.pixels += torch.stack([(signs > 0).sum(1), (signs < 0).sum(1)])
        for name, criterion in self.criteria.items():
            self._add_gradients(name, pixel_gradients(criterion, logits, labels, self.h), signs)
        flat = logits.transpose(0, 1).flatten(1)  # (N, P)
        parents, children = self.h.edge_index("cpu")
        violated = (flat[children] > 0) & (flat[parents] <= 0) & is_label
        self.violations += violated.sum(1)
        self._add_calibration(flat.sigmoid(), signs)

    def _add_gradients(self, name: str, gradients: Tensor, signs: Tensor) -> None:
        """[where it is not 0, its mean size] x [positive, negative] x node."""
        for side, of_side in enumerate((signs > 0, signs < 0)):
            sizes = gradients.abs() * of_side
            self.gradients[name][0, side] += (sizes > 0).sum(1)
            self.gradients[name][1, side] += sizes.sum(1, dtype=torch.float64)

    def _add_calibration(self, scores: Tensor, signs: Tensor) -> None:
        index = (scores * BINS).long().clamp_(max=BINS - 1)
        known = signs != 0
        for row, values in enumerate((known, scores * known, signs > 0)):
            self.bins[row].scatter_add_(1, index, values.double())

    def summary(self) -> dict[str, Any]:
        """Plain JSON types, by node name; None where nothing was seen."""
        names = self.h.names
        edges = {names[child]: self._rate(self.violations[e]) for e, (_, child) in enumerate(self.h.edges)}
        pairs = self.labelled * len(self.h.edges)
        return {
            "pixels": self.labelled,
            "background": [names[v] for v in sorted(self.h.background)],
            "gradients": {name: self._gradient_summary(name) for name in self.criteria},
            "violation_rate": float(self.violations.sum()) / pairs if pairs else None,
            "violations": edges,
            "calibration": {names[v]: self._calibration(v) for v in range(self.h.num_nodes)},
        }

    def _gradient_summary(self, criterion: str) -> dict[str, Any]:
        share, size = (self.gradients[criterion] / self.pixels).tolist()  # NaN where there is no such pixel
        return {
            name: {
                side: {"pixels": int(self.pixels[s, v]), "share": _known(share[s][v]), "mean_size": _known(size[s][v])}
                for s, side in enumerate(("positive", "negative"))
            }
            for v, name in enumerate(self.h.names)
        }

    def _calibration(self, v: int) -> dict[str, Any]:
        """Mean score against share of pixels, over all and in bins of the score; ECE is their mean distance."""
        pixels, scores, positives = self.bins[:, v]
        total = float(pixels.sum())
        filled = pixels > 0
        table = torch.stack([scores[filled] / pixels[filled], positives[filled] / pixels[filled], pixels[filled]], 1)
        if not total:
            return {"mean_score": None, "share": None, "ECE": None, "bins": []}
        return {
            "mean_score": float(scores.sum()) / total,
            "share": float(positives.sum()) / total,
            "ECE": float((scores - positives).abs().sum()) / total,
            "bins": table.tolist(),
        }

    def _rate(self, count: Tensor) -> float | None:
        return float(count) / self.labelled if self.labelled else None


def pixel_gradients(criterion: Criterion, logits: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    """Gradient of each pixel's own loss by its logits. Shape: (B, N, H, W), (B, H, W) -> (N, B * H * W)."""
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(logits, labels), logits)
    labelled = (labels != h.ignore_index).sum()  # the criterion is a mean over these
    return (gradient * labelled).transpose(0, 1).flatten(1)


def _known(value: float) -> float | None:
    return value if value == value else None  # NaN is not equal to itself
