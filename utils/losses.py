"""Losses on a label tree: from integer labels at any depth, computed chunk by chunk with their gradient.

    loss = LOSSES["tree_min"](logits, labels, h)
    criterion = build_criterion({"tree_min": 1.0, "bce": 1.0}, h, gamma=0.0, node_weights=None)

With y = z where a node is on the label's path and y = -z where it is not (its margin: positive is right),

    bce        sum over known nodes of softplus(-y)
    tree_min   the same with z the lowest logit from the root to a positive node, and the highest logit below a
               negative one
    focal      each term of bce times (1 - p)^gamma, with p = sigmoid(y); focal_tree_min likewise
    ce         -log of the softmax over the leaves, summed over the leaves at or below the label
    path_ce    the same for every node from the root to the label, added up: a mistake costs more, the higher in the
               tree it is made

and each is averaged over the pixels that have a label. Nodes below the label are unknown and have no term.

Min and max commute with sigmoid, so they are taken on logits, and softplus needs no epsilon. Everything is
computed in float32 (float64 for float64 logits), whatever autocast says. Loss and gradient come out of one pass
over chunks that stay in the cache: labels are expanded there and nowhere else, and the gradient is all that is
kept for backward.

Source: Li et al., "Deep Hierarchical Semantic Segmentation", CVPR 2022, for Tree-Min and its focal form. We sum
over nodes where they average, and admit labels at inner nodes. path_ce is the hierarchical cross-entropy of
Bertinetto et al., "Making Better Mistakes", CVPR 2020, with equal weights of the nodes' own log probabilities.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from utils.chunks import chunks
from utils.hierarchy import Hierarchy

Criterion = Callable[[Tensor, Tensor], Tensor]
NODE_WEIGHTS = ("none", "inverse_sqrt", "effective_number")

PRODUCT_ROWS = 64  # a product of this many numbers up to 2 is far from overflow


class Chunk:
    """Some pixels of a batch, nodes first, and what several losses share about them."""

    def __init__(self, logits: Tensor, index: Tensor, h: Hierarchy, gamma: float, node_weights: Tensor | None) -> None:
        self.logits = logits  # (N, P) float32 or float64
        self.index = index  # (P,) node ids, N for void
        self.h = h
        self.gamma = gamma
        self.node_weights = node_weights  # (N,) or None

    @cached_property
    def signs(self) -> Tensor:
        """(N, P): 1 positive, -1 negative, 0 unknown."""
        return self.h.signs(self.logits.device, self.logits.dtype).index_select(1, self.index)


# ---- one term per node: value and slope as a function of the margin --------------------------------------------


def _node_terms(margin: Tensor, chunk: Chunk, gamma: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the nodes' terms, and the slope of each by its margin, 0 for unknown nodes.

    Shape: (N, P), a margin of 0 where unknown -> scalar, (N, P).
    """
    if gamma == 0 and chunk.node_weights is None:
        total = _softplus_sum(margin, chunk.signs)
        return total, torch.sigmoid(margin.neg()).neg_().mul_(chunk.signs.abs()) if need_grad else None
    known = chunk.signs.abs()
    if chunk.node_weights is not None:
        known.mul_(chunk.node_weights.unsqueeze(1))
    wrong = torch.sigmoid(margin.neg())  # 1 - p
    penalty = torch.nn.functional.softplus(margin.neg())
    factor = known * wrong.pow(gamma)
    total = (factor * penalty).sum()
    if not need_grad:
        return total, None
    # d/dy of wrong^gamma * penalty; written without wrong^(gamma - 1), which is infinite at 0
    slope = penalty.mul_(1 - wrong).mul_(gamma).add_(wrong).mul_(factor).neg_()
    return total, slope


def _softplus_sum(margin: Tensor, signs: Tensor) -> Tensor:
    """Sum of softplus(-margin) over known nodes, with one logarithm a pixel instead of one a node.

    softplus(-y) = max(-y, 0) + log1p(e), e = exp(-|y|), and the sum of log1p(e_v) is log1p(q) where
    1 + q is the product of the 1 + e_v. Joined pairwise as q = a + b + ab, q keeps its relative precision however
    small; logarithms are the dearest operation on a CPU.
    """
    small = torch.sigmoid(margin.abs().neg_())  # e / (1 + e)
    e = small.div_(1 - small).mul_(signs.abs())
    total = margin.clamp(max=0).sum().neg_()
    for rows in e.split(PRODUCT_ROWS):
        while len(rows) > 1:
            half = len(rows) // 2
            a, b = rows[:half], rows[half : 2 * half]
            joined = torch.addcmul(a + b, a, b)
            rows = joined if 2 * half == len(rows) else torch.cat([joined, rows[2 * half :]])
        total += rows.log1p_().sum()
    return total


# ---- the losses: chunk -> sum over its pixels, gradient by the logits --------------------------------------------


def _bce(chunk: Chunk, need_grad: bool, gamma: float = 0.0) -> tuple[Tensor, Tensor | None]:
    total, slope = _node_terms(chunk.logits * chunk.signs, chunk, gamma, need_grad)
    return total, slope.mul_(chunk.signs) if need_grad else None


def _tree_min(chunk: Chunk, need_grad: bool, gamma: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Each node judged by the worst logit among its ancestors (if positive) or its descendants (if negative).

    Descendants of a negative node are negative and ancestors of a positive one positive, so both extremes can be
    taken over the whole tree, whatever the label, and chosen from afterwards. The gradient of an extreme goes to
    one node: on a tie an ancestor before a descendant in the minimum, a descendant before an ancestor (the lowest
    id among siblings) in the maximum.
    """
    edges = chunk.h.edges
    lowest, highest = chunk.logits.clone(), chunk.logits.clone()
    low, high = lowest.unbind(), highest.unbind()
    for parent, child in edges:
        torch.minimum(low[child], low[parent], out=low[child])
    for parent, child in reversed(edges):
        torch.maximum(high[parent], high[child], out=high[parent])

    positive, negative = chunk.signs.clamp(min=0), chunk.signs.clamp(max=0)
    margin = (lowest * positive).addcmul_(highest, negative)
    total, slope = _node_terms(margin, chunk, gamma, need_grad)
    if not need_grad or not edges:
        return total, slope.mul_(chunk.signs) if need_grad else None

    to_lowest, to_highest = positive.mul_(slope), negative.mul_(slope)
    parents, children = chunk.h.edge_index(chunk.logits.device)
    # eq_ in place keeps the float type, so that a product with it needs no conversion
    from_parent = lowest.index_select(0, children).eq_(lowest.index_select(0, parents)).unbind()
    from_child = highest.index_select(0, parents).eq_(highest.index_select(0, children)).unbind()
    low, high = to_lowest.unbind(), to_highest.unbind()
    for e, (parent, child) in reversed(list(enumerate(edges))):
        _move(low[child], low[parent], from_parent[e])
    for e, (parent, child) in enumerate(edges):
        _move(high[parent], high[child], from_child[e])
    return total, to_lowest.add_(to_highest)


def _move(source: Tensor, target: Tensor, where: Tensor) -> None:
    """Moves gradient between two nodes, in place, at the pixels where the extreme came from the other."""
    moved = where.mul_(source)
    target.add_(moved)
    source.sub_(moved)


def _ce(chunk: Chunk, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    return _mass_terms(chunk, chunk.index.unsqueeze(0), need_grad)


def _path_ce(chunk: Chunk, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    return _mass_terms(chunk, chunk.h.path_table(chunk.index.device).index_select(1, chunk.index), need_grad)


def _mass_terms(chunk: Chunk, nodes: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """-log of the softmax's mass on the leaves at or below each node. Void lies above all leaves: -log 1 = 0.

    Shape: (K, P) node ids, N for void -> scalar, (N, P).
    """
    logits = chunk.logits
    leaves = chunk.h.leaf_index(logits.device)
    leaf_logits = logits.index_select(0, leaves)
    leaves_below = chunk.h.leaves_below(logits.device, logits.dtype)
    weights = None if chunk.node_weights is None else torch.cat([chunk.node_weights, logits.new_zeros(1)])
    total_all, share_all = _log_sum_exp(leaf_logits, need_grad)
    total = logits.new_zeros(())
    slope = torch.zeros_like(leaf_logits) if need_grad else None
    for node in nodes:
        below = leaves_below.index_select(1, node)
        total_below, share_below = _log_sum_exp(leaf_logits + (below - 1).mul_(1e30), need_grad)
        term = total_all - total_below
        weight = None if weights is None else weights.index_select(0, node)
        total += (term if weight is None else term.mul_(weight)).sum()
        if need_grad:
            change = torch.sub(share_all, share_below, out=share_below)
            slope += change if weight is None else change.mul_(weight)
    if not need_grad:
        return total, None
    return total, torch.zeros_like(logits).index_copy_(0, leaves, slope)


def _log_sum_exp(logits: Tensor, need_shares: bool) -> tuple[Tensor, Tensor | None]:
    """log of the sum of exp over rows, and each row's share in it. Shape: (L, P) -> (P,), (L, P)."""
    highest = logits.amax(0)
    shares = (logits - highest).exp_()
    mass = shares.sum(0)
    return mass.log().add_(highest), shares.div_(mass) if need_shares else None


_TERMS: dict[str, Callable[[Chunk, bool], tuple[Tensor, Tensor | None]]] = {
    "ce": _ce,
    "path_ce": _path_ce,
    "bce": _bce,
    "focal": lambda chunk, need_grad: _bce(chunk, need_grad, chunk.gamma),
    "tree_min": _tree_min,
    "focal_tree_min": lambda chunk, need_grad: _tree_min(chunk, need_grad, chunk.gamma),
}


# ---- from chunks to the whole batch ------------------------------------------------------------------------------


class _TreeLoss(torch.autograd.Function):
    """Weighted sum of losses, mean over labelled pixels; loss and gradient in one pass over the chunks."""

    @staticmethod
    def forward(ctx, logits, labels, h, weights, gamma, node_weights):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        need_grad = ctx.needs_input_grad[0]
        flat = logits.flatten(2)  # (B, N, H, W) -> (B, N, HW)
        index = h.index_of(labels).flatten(1)
        grad = torch.empty_like(flat) if need_grad else None
        if node_weights is not None:
            node_weights = node_weights.to(logits.device, dtype)

        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for samples, pixels in chunks(flat.shape, flat.device):
            part = flat[samples, :, pixels].transpose(0, 1)  # (N, b, p)
            part_index = index[samples, pixels].reshape(-1)
            chunk = Chunk(part.to(dtype).flatten(1), part_index, h, gamma, node_weights)
            chunk_grad = None
            for name, weight in weights.items():
                term, term_grad = _TERMS[name](chunk, need_grad)
                total += weight * term
                if need_grad:
                    term_grad = term_grad if weight == 1 else term_grad.mul_(weight)
                    chunk_grad = term_grad if chunk_grad is None else chunk_grad.add_(term_grad)
            if need_grad:
                grad[samples, :, pixels] = chunk_grad.unflatten(1, part.shape[1:]).transpose(0, 1)

        labelled = (index != h.num_nodes).sum().clamp_(min=1)  # a batch without labels has loss 0, not 0 / 0
        if need_grad:
            ctx.save_for_backward(grad.unflatten(2, logits.shape[2:]), labelled)
        return (total / labelled).to(dtype)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():  # create_graph=True; the kept gradient would pass for a constant, silently
            raise RuntimeError("the tree losses have no second derivative; call backward without create_graph")
        grad, labelled = ctx.saved_tensors
        scale = grad_output / labelled
        if grad.dtype in (torch.float32, torch.float64):
            return grad * scale, None, None, None, None, None
        scaled = torch.empty_like(grad)  # a half-precision scale would be off by up to 0.4 %, or underflow
        for source, target in zip(grad, scaled, strict=True):
            target.copy_(source.float().mul_(scale))
        return scaled, None, None, None, None, None


def _check_shapes(logits: Tensor, labels: Tensor, h: Hierarchy) -> None:
    expected = (logits.shape[0], *logits.shape[2:])
    if logits.dim() != 4 or logits.shape[1] != h.num_nodes or labels.shape != expected:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: expected "
            f"(B, {h.num_nodes}, H, W) and (B, H, W) for the tree {h.name!r}"
        )


def build_criterion(
    spec: str | Mapping[str, float], h: Hierarchy, gamma: float = 0.0, node_weights: Tensor | None = None
) -> Criterion:
    """A loss by name, or a sum of losses by name and weight, as a function of logits and labels.

    The losses of a sum share one pass over the logits. Only the focal forms use `gamma`. `node_weights` (N,)
    multiply each node's term; in `ce`, where a pixel has one term, the weight is that of its label.

    Shape: logits (B, N, H, W), labels (B, H, W) of any integer type -> scalar, float32 or float64.
    Raises: UserError for an unknown name, a weight that is not positive, a negative gamma.
    """
    weights = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    _check_spec(weights, gamma, node_weights, h)

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        _check_shapes(logits, labels, h)
        return _TreeLoss.apply(logits, labels, h, weights, gamma, node_weights)

    return criterion


def _check_spec(weights: Mapping[str, Any], gamma: float, node_weights: Tensor | None, h: Hierarchy) -> None:
    if not weights:
        raise UserError(f"criterion: no loss is named; choose from {', '.join(_TERMS)}")
    for name, weight in weights.items():
        if name not in _TERMS:
            raise UserError(f"criterion: unknown loss {name!r}; choose from {', '.join(_TERMS)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"criterion: the weight of {name!r} is {weight!r}; it must be a positive number")
    if not 0 <= gamma < float("inf"):
        raise UserError(f"gamma: {gamma!r} is not a number of at least 0")
    if node_weights is not None and node_weights.shape != (h.num_nodes,):
        raise UserError(f"node weights: shape {tuple(node_weights.shape)}; the tree {h.name!r} needs ({h.num_nodes},)")


def _named(name: str) -> Callable[..., Tensor]:
    def loss(
        logits: Tensor,
        labels: Tensor,
        h: Hierarchy,
        gamma: float = 0.0,
        node_weights: Tensor | None = None,
    ) -> Tensor:
        return build_criterion(name, h, gamma, node_weights)(logits, labels)

    loss.__name__ = name
    loss.__doc__ = f"The loss {name!r} as a pure function; see `build_criterion`."
    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {name: _named(name) for name in _TERMS}


# ---- weights against rare classes --------------------------------------------------------------------------------


def node_weights(mode: str, pixel_counts: Sequence[int], h: Hierarchy) -> Tensor | None:
    """Weights per node with mean 1 from how many pixels carry each node as their label; None for "none".

    A node's pixels are its own and its descendants'. With f its share of all pixels,
    `inverse_sqrt` is f^(-1/2) and `effective_number` is 1 / (1 - beta^n) with beta = 1 - 1 / (all pixels),
    close to 1 / f for rare nodes. A node without pixels gets the largest weight of the others.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019 (effective number).
    Raises: UserError for an unknown mode, or counts that do not fit the tree.
    """
    if mode not in NODE_WEIGHTS:
        raise UserError(f"node weights: unknown mode {mode!r}; choose from {', '.join(NODE_WEIGHTS)}")
    if mode == "none":
        return None
    if len(pixel_counts) != h.num_nodes or min(pixel_counts) < 0 or sum(pixel_counts) == 0:
        raise UserError(
            f"node weights: {mode!r} needs {h.num_nodes} pixel counts, not all 0, for the tree {h.name!r}; got "
            f"{list(pixel_counts)}; encode the masks again"
        )
    counts = torch.zeros(h.num_nodes, dtype=torch.float64)
    for v, count in enumerate(pixel_counts):
        counts[list(h.paths[v])] += count
    share = counts / sum(pixel_counts)
    weights = share.rsqrt() if mode == "inverse_sqrt" else 1 / -torch.expm1(-share)
    weights[counts == 0] = weights[counts > 0].max()
    return (weights / weights.mean()).float()
