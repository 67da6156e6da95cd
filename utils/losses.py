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

from utils.chunks import Workspace, cuts
from utils.errors import UserError
from utils.hierarchy import Hierarchy

Criterion = Callable[[Tensor, Tensor], Tensor]
NODE_WEIGHTS = ("none", "inverse_sqrt", "effective_number")

PRODUCT_ROWS = 64  # a product of this many numbers up to 2 is far from overflow
FAR = 1e30  # beyond any wrongness, and finite: 0 times it is 0


class Chunk:
    """Some pixels of a batch in K blocks, and what several losses share about them."""

    def __init__(
        self,
        logits: Tensor,
        index: Tensor,
        grad: Tensor | None,
        h: Hierarchy,
        gamma: float,
        node_weights: Tensor | None,
        space: Workspace,
    ) -> None:
        self.logits = logits  # (K, N, P) float32 or float64, a view into the batch
        self.index = index  # (K, P) node ids, N for void
        self.grad = grad  # (K, N, P), where the gradient is written; None where none is wanted
        self.h = h
        self.gamma = gamma
        self.node_weights = node_weights  # (N,) or None
        self.space = space
        self.is_first = True  # nothing has been written to `grad` yet

    def buffer(self, name: str, rows: int | None = None) -> Tensor:
        """A workspace of (K, rows, P), by default (K, N, P)."""
        blocks, nodes, pixels = self.logits.shape
        return self.space(name, (blocks, nodes if rows is None else rows, pixels), self.logits)

    @cached_property
    def wrong(self) -> Tensor:
        """(K, N, P), breadth first: -1 positive, 1 negative, 0 unknown; times the logit, how wrong the node is."""
        table = self.h.wrong(self.logits.device, self.logits.dtype)
        table, index = table.expand(len(self.index), -1, -1), self.index.unsqueeze(1).expand(self.logits.shape)
        return torch.gather(table, 2, index, out=self.buffer("wrong"))

    @cached_property
    def may_have_unknown(self) -> bool:
        """Whether a label may be void or an inner node. On a GPU, which would stall to tell: yes."""
        if self.index.device.type != "cpu":
            return True
        return not bool(self.h.is_leaf(self.index.device).take(self.index).all())

    def wrongness(self) -> Tensor:
        """(K, N, P), breadth first, of the nodes' own logits; the caller's to overwrite."""
        result = self.buffer("wrongness")
        for ids, rows in self.h.runs:
            torch.mul(self.logits[:, ids], self.wrong[:, rows], out=result[:, rows])
        return result

    def add_gradient(self, slope: Tensor, weight: float) -> None:
        """Adds a gradient by wrongness to that by the logits. Shape: (K, N, P), breadth first. Overwrites `slope`."""
        if weight != 1:
            slope.mul_(weight)
        for ids, rows in self.h.runs:
            if self.is_first:
                torch.mul(slope[:, rows], self.wrong[:, rows], out=self.grad[:, ids])
            else:
                self.grad[:, ids].addcmul_(slope[:, rows], self.wrong[:, rows])
        self.is_first = False


# ---- one term per node: value and slope as a function of how wrong the node is ---------------------------------

# A node's wrongness is n = -y: its term is softplus(n), its slope sigmoid(n), and 0 stands for unknown.


def _node_terms(wrongness: Tensor, chunk: Chunk, gamma: float) -> tuple[Tensor, Tensor]:
    """Sum of the nodes' terms, and the slope of each by its wrongness; that of an unknown node means nothing.

    Shape: (K, N, P) in the order of `chunk.wrong` -> scalar, (K, N, P).
    """
    slope = torch.sigmoid(wrongness, out=chunk.buffer("slope"))  # 1 - p
    if gamma == 0 and chunk.node_weights is None:
        return _softplus_sum(wrongness, slope, chunk), slope
    factor = chunk.wrong.abs()
    if chunk.node_weights is not None:
        order = chunk.h.breadth_first_index(factor.device)
        factor.mul_(chunk.node_weights.index_select(0, order).unsqueeze(1))
    factor.mul_(slope.pow(gamma))
    penalty = torch.nn.functional.softplus(wrongness)
    total = (factor * penalty).sum()
    # d/dn of slope^gamma * penalty; written without slope^(gamma - 1), which is infinite at 0
    return total, penalty.mul_(1 - slope).mul_(gamma).add_(slope).mul_(factor)


def _softplus_sum(wrongness: Tensor, slope: Tensor, chunk: Chunk) -> Tensor:
    """Sum of softplus(n) over known nodes, with one logarithm a pixel instead of one a node.

    softplus(n) = max(n, 0) + log1p(e), e = exp(-|n|), and the sum of log1p(e_v) is log1p(q) where
    1 + q is the product of the 1 + e_v. Joined pairwise as q = a + b + ab, q keeps its relative precision however
    small; logarithms are the dearest operation on a CPU. With s = sigmoid(n), e is min(s, 1 - s) / max(s, 1 - s):
    1 - s is inexact only where n > 0 outweighs it.
    """
    other = torch.sub(1, slope, out=chunk.buffer("other"))
    e = torch.minimum(slope, other, out=chunk.buffer("product"))
    e.div_(torch.maximum(slope, other, out=other))
    if chunk.may_have_unknown:
        e.mul_(chunk.wrong).mul_(chunk.wrong)
    total = torch.clamp(wrongness, min=0, out=other).sum()
    for rows in e.split(PRODUCT_ROWS, dim=1):
        while (count := rows.shape[1]) > 1:
            half = (count + 1) // 2  # of an odd number the last waits
            a, b = rows[:, : count - half], rows[:, half:]
            a_plus_b = torch.add(a, b, out=other[:, : count - half])
            a.mul_(b).add_(a_plus_b)
            rows = rows[:, :half]
        total += _log1p(rows[:, 0], other[:, 0]).sum()
    return total


def _log1p(q: Tensor, out: Tensor) -> Tensor:
    """log1p for q >= 0 by a logarithm and its rounding error: torch.log1p takes five times as long on a CPU."""
    u = torch.add(q, 1, out=out)
    lost = (u - 1).sub_(q).div_(u)
    return u.log_().sub_(lost)


# ---- the losses: chunk -> sum over its pixels; weight times the gradient by the logits is added to chunk.grad -----


def _bce(chunk: Chunk, weight: float, gamma: float = 0.0) -> Tensor:
    total, slope = _node_terms(chunk.wrongness(), chunk, gamma)
    if chunk.grad is not None:
        chunk.add_gradient(slope, weight)
    return total


def _tree_min(chunk: Chunk, weight: float, gamma: float = 0.0) -> Tensor:
    """Each node judged by the worst logit among its ancestors (if positive) or its descendants (if negative).

    In wrongness both are one rule, a maximum along edges: from a parent down to a positive child, from the children
    up to a negative parent. Nowhere do the two meet: ancestors of a positive node are positive, descendants of a
    negative one negative. The gradient of a maximum goes to one node: on a tie to an ancestor on the way down, to a
    descendant (the lowest id among siblings) on the way up.
    """
    families, wrong = chunk.h.families, chunk.wrong
    n = chunk.wrongness()
    down = torch.add(wrong, 1, out=chunk.buffer("down"))  # 0 where positive
    up = chunk.buffer("up", len(families))
    for parent, children in families:
        own, offer = n[:, children], down[:, children]
        torch.sub(n[:, parent : parent + 1], offer, alpha=FAR, out=offer)
        torch.maximum(own, offer, out=own)
    for f, (parent, children) in reversed(list(enumerate(families))):
        own, offer = n[:, parent], torch.amax(n[:, children], 1, out=up[:, f])
        offer.sub_(1 - wrong[:, parent], alpha=FAR)
        torch.maximum(own, offer, out=own)

    total, slope = _node_terms(n, chunk, gamma)
    if chunk.grad is None:
        return total
    # Where the maximum is the offer, the slope moves to where that came from. eq_ in place keeps the float type.
    for parent, children in reversed(families):
        own = slope[:, children]
        moved = down[:, children].eq_(n[:, children]).mul_(own)
        own.sub_(moved)
        slope[:, parent].add_(moved.sum(1))
    for f, (parent, children) in enumerate(families):
        own = slope[:, parent]
        moved = up[:, f].eq_(n[:, parent]).mul_(own)
        own.sub_(moved)
        takes = torch.eq(n[:, children], n[:, parent : parent + 1], out=down[:, children])
        for row in takes.unbind(1):
            moved.sub_(row.mul_(moved))  # nothing is left for the next one
        slope[:, children].add_(takes)
    chunk.add_gradient(slope, weight)
    return total


def _ce(chunk: Chunk, weight: float) -> Tensor:
    return _mass_terms(chunk, weight, [chunk.index])


def _path_ce(chunk: Chunk, weight: float) -> Tensor:
    table = chunk.h.path_table(chunk.index.device)
    return _mass_terms(chunk, weight, [nodes[chunk.index] for nodes in table])


def _mass_terms(chunk: Chunk, weight: float, nodes: Sequence[Tensor]) -> Tensor:
    """-log of the softmax's mass on the leaves at or below each node. Void lies above all leaves: -log 1 = 0.

    Shape: times (K, P) node ids, N for void -> scalar.
    """
    logits, need_grad = chunk.logits, chunk.grad is not None
    leaves = chunk.h.leaf_index(logits.device)
    leaf_logits = logits.index_select(1, leaves)
    leaves_below = chunk.h.leaves_below(logits.device, logits.dtype).expand(len(logits), -1, -1)
    weights = None if chunk.node_weights is None else torch.cat([chunk.node_weights, logits.new_zeros(1)])
    total_all, share_all = _log_sum_exp(leaf_logits, need_grad)
    total = logits.new_zeros(())
    slope = torch.zeros_like(leaf_logits) if need_grad else None
    for node in nodes:
        below = leaves_below.gather(2, node.unsqueeze(1).expand(-1, len(leaves), -1))
        total_below, share_below = _log_sum_exp(below.sub_(1).mul_(FAR).add_(leaf_logits), need_grad)
        term = total_all - total_below
        node_weight = None if weights is None else weights[node]
        total += (term if weights is None else term.mul_(node_weight)).sum()
        if need_grad:
            change = torch.sub(share_all, share_below, out=share_below)
            slope += change if weights is None else change.mul_(node_weight.unsqueeze(1))
    if need_grad:
        if chunk.is_first:
            chunk.grad.zero_()
        for row, leaf in enumerate(chunk.h.leaves):
            chunk.grad[:, leaf].add_(slope[:, row], alpha=weight)
        chunk.is_first = False
    return total


def _log_sum_exp(logits: Tensor, need_shares: bool) -> tuple[Tensor, Tensor | None]:
    """log of the sum of exp over rows, and each row's share in it. Shape: (K, L, P) -> (K, P), (K, L, P)."""
    highest = logits.amax(1, keepdim=True)
    shares = (logits - highest).exp_()
    mass = shares.sum(1, keepdim=True)
    return mass.log().add_(highest).squeeze(1), shares.div_(mass) if need_shares else None


_TERMS: dict[str, Callable[[Chunk, float], Tensor]] = {
    "ce": _ce,
    "path_ce": _path_ce,
    "bce": _bce,
    "focal": lambda chunk, weight: _bce(chunk, weight, chunk.gamma),
    "tree_min": _tree_min,
    "focal_tree_min": lambda chunk, weight: _tree_min(chunk, weight, chunk.gamma),
}


# ---- from chunks to the whole batch ------------------------------------------------------------------------------


class _TreeLoss(torch.autograd.Function):
    """Weighted sum of losses, mean over labelled pixels; loss and gradient in one pass over the chunks."""

    @staticmethod
    def forward(ctx, logits, labels, *spec):
        total, ctx.grad = _sum_and_grad(logits, labels, *spec, need_grad=ctx.needs_input_grad[0])
        h = spec[0]
        labelled = (labels != h.ignore_index).sum().clamp_(min=1)  # a batch without labels has loss 0, not 0 / 0
        ctx.spec = spec
        ctx.save_for_backward(logits, labels, labelled)
        return (total / labelled).to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():  # create_graph=True; the kept gradient would pass for a constant, silently
            raise RuntimeError("the tree losses have no second derivative; call backward without create_graph")
        logits, labels, labelled = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None  # handed over: a copy would be as large as the logits
        if grad is None:  # a second time through a graph that was retained
            _, grad = _sum_and_grad(logits, labels, *ctx.spec, need_grad=True)
        scale = grad_output / labelled
        if grad.dtype in (torch.float32, torch.float64):
            grad.mul_(scale)
        else:  # a half-precision scale would be off by up to 0.4 %, or underflow
            for sample in grad:
                sample.copy_(sample.float().mul_(scale))
        return grad, None, *(None for _ in ctx.spec)


def _sum_and_grad(
    logits: Tensor,
    labels: Tensor,
    h: Hierarchy,
    weights: Mapping[str, float],
    gamma: float,
    node_weights: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the losses over all labelled pixels, and its gradient. Shape: as `build_criterion` -> (), (B, N, H, W)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat = logits.flatten(2)  # (B, N, H, W) -> (B, N, HW)
    flat_labels = labels.flatten(1)
    grad = torch.empty_like(flat) if need_grad else None
    if node_weights is not None:
        node_weights = node_weights.to(logits.device, dtype)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    space = Workspace()
    for cut in cuts(flat.shape, flat.device):
        place = cut(grad) if need_grad else None
        chunk = Chunk(cut(flat).to(dtype), h.index_of(cut(flat_labels)), place, h, gamma, node_weights, space)
        for name, weight in weights.items():
            total += weight * _TERMS[name](chunk, weight)
    return total, grad.view(logits.shape) if need_grad else None


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
