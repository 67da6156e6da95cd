"""Weights against rare classes, from how many pixels carry each node as their label."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UserError
from utils.hierarchy import Hierarchy


def node_weights(mode: str, pixel_counts: Sequence[int], h: Hierarchy) -> Tensor | None:
    """Weights per node with mean 1 from how many pixels carry each node as their label; None for "none".

    A node's pixels are its own and its descendants'. With f its share of all pixels,
    `inverse_sqrt` is f^(-1/2) and `effective_number` is 1 / (1 - beta^n) with beta = 1 - 1 / (all pixels),
    close to 1 / f for rare nodes. A node without pixels gets the largest weight of the others.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019 (effective number).
    Raises: UserError for counts that do not fit the tree, or are all 0.
    """
    if mode == "none":
        return None
    if len(pixel_counts) != h.num_nodes or not sum(pixel_counts):
        raise UserError(f"key 'node_weights': no pixel of the tree {h.name!r} was counted; encode the masks again")
    counts = torch.zeros(h.num_nodes, dtype=torch.float64)
    for v, count in enumerate(pixel_counts):
        counts[list(h.paths[v])] += count
    share = counts / sum(pixel_counts)
    weights = share.rsqrt() if mode == "inverse_sqrt" else 1 / -torch.expm1(-share)
    weights[counts == 0] = weights[counts > 0].max()
    return (weights / weights.mean()).float()
