"""Losses on a label tree, from integer labels at any depth.

    loss = LOSSES["tree_min"](logits, labels, h)
    criterion = build_criterion({"tree_min": 1.0, "bce": 1.0}, h, gamma=0.0, node_weights=None)

Each is a plain function (z, y, h, gamma, weights) -> (B, H, W), a term per pixel; autograd differentiates.

    z        logits in float32 or float64. Shape: (B, N, H, W)
    y        labels as columns of the tables of `Hierarchy`: the node, N for void. Shape: (B, H, W) int64
    gamma    exponent of the focal forms; the others leave it alone
    weights  a factor for each node's term, or None; for `ce` and `soft_margin` it is that of the label. Shape: (N,)

Nodes below the label are unknown: nothing is asked of them. Min and max commute with sigmoid, so they are taken on
logits, and softplus needs no epsilon.

Source: Li et al., "Deep Hierarchical Semantic Segmentation", CVPR 2022, for Tree-Min and its focal form; we sum over
nodes where they average.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.hierarchy import Hierarchy

Criterion = Callable[[Tensor, Tensor], Tensor]
NODE_WEIGHTS = ("none", "inverse_sqrt", "effective_number")
FAR = 1e30  # beyond any logit, and finite: 0 times it is 0


# ---- one sigmoid a node: the term is softplus(-margin), and a positive margin is right ----------------------------


def bce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each known node: its logit where it is on the label's path, minus it where it is not."""
    signs = look_up(h.signs(z.device, z.dtype), y)
    return node_terms(signs * z, signs, gamma, weights)


def tree_min(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """`bce` of the lowest logit from the root to a positive node, and of the highest at or below a negative one."""
    signs = look_up(h.signs(z.device, z.dtype), y)
    margin = torch.where(signs > 0, min_down(z, h), -max_up(z, h))
    return node_terms(margin, signs, gamma, weights)


def node_terms(margin: Tensor, signs: Tensor, gamma: float, weights: Tensor | None) -> Tensor:
    terms = F.softplus(-margin) * signs.abs()
    if gamma:
        terms = terms * (gamma * F.logsigmoid(-margin)).exp()  # (1 - p)^gamma, whose slope stays finite at 0
    if weights is not None:
        terms = terms * weights.view(-1, 1, 1)
    return terms.sum(1)


# `where` instead of torch.minimum, whose backward halves the gradient of ties in ten passes; a NaN stays in its own row
def min_down(z: Tensor, h: Hierarchy) -> Tensor:
    """Each node's lowest logit from its root down to itself. Shape: (B, N, H, W), as the result."""
    rows = list(z.unbind(1))
    for parent, child in h.edges:
        rows[child] = torch.where(rows[parent] < rows[child], rows[parent], rows[child])
    return torch.stack(rows, 1)


def max_up(z: Tensor, h: Hierarchy) -> Tensor:
    """Each node's highest logit at or below itself. Shape: (B, N, H, W), as the result."""
    rows = list(z.unbind(1))
    for parent, child in reversed(h.edges):
        rows[parent] = torch.where(rows[child] > rows[parent], rows[child], rows[parent])
    return torch.stack(rows, 1)


# ---- one softmax over the leaves: m(v) is its mass on the leaves at or below v ------------------------------------


def ce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """-log m(label). An inner label leaves open which of its leaves it is."""
    log_p = leaf_rows(z, h).log_softmax(1)
    return _of_label(-log_p.where(look_up(h.leaves_below(z.device), y), -FAR).logsumexp(1), y, weights)


def path_ce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Sum of -log m(v) over the label's path: a mistake costs more, the higher in the tree it is made.

    Source: Bertinetto et al., "Making Better Mistakes", CVPR 2020, with equal weights of the nodes' own masses.
    """
    return mass_term(z, y, h.signs(z.device, z.dtype)[:, :-1].clamp(min=0), h, weights)


def mass_term(z: Tensor, y: Tensor, factors: Tensor, h: Hierarchy, weights: Tensor | None) -> Tensor:
    """Sum over nodes v of factors[v, label] * -log m(v). Shape: (N, N) factors -> (B, H, W)."""
    if weights is not None:
        factors = factors * weights.unsqueeze(1)
    return -(log_mass(z, h) * look_up(F.pad(factors, (0, 1)), y)).sum(1)


def _of_label(term: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    return term if weights is None else term * F.pad(weights, (0, 1))[y]


def leaf_rows(z: Tensor, h: Hierarchy) -> Tensor:
    rows = z.unbind(1)
    return torch.stack([rows[v] for v in h.leaves], 1)


def log_mass(z: Tensor, h: Hierarchy) -> Tensor:
    """log m(v) of each node, from the leaves up. Shape: (B, N, H, W), as the result."""
    rows = list(z.unbind(1))
    for v, row in zip(h.leaves, leaf_rows(z, h).log_softmax(1).unbind(1), strict=True):
        rows[v] = row
    for v in reversed(h.preorder):
        if h.children[v]:
            rows[v] = torch.stack([rows[child] for child in h.children[v]]).logsumexp(0)
    return torch.stack(rows, 1)


def look_up(table: Tensor, y: Tensor) -> Tensor:
    """Each label's column of a table. Shape: (K, N + 1), (B, H, W) -> (B, K, H, W)."""
    return table[:, y].movedim(0, 1)


# ---- by name, and sums of them -----------------------------------------------------------------------------------

PIXEL_LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": ce,
    "path_ce": path_ce,
    "bce": lambda z, y, h, gamma, weights: bce(z, y, h, 0.0, weights),
    "focal": bce,
    "tree_min": lambda z, y, h, gamma, weights: tree_min(z, y, h, 0.0, weights),
    "focal_tree_min": tree_min,
}


def build_criterion(
    spec: str | Mapping[str, float],
    h: Hierarchy,
    gamma: float = 0.0,
    node_weights: Tensor | None = None,
    compile: bool = False,
) -> Criterion:
    """A loss by name, or a sum of losses by name and weight: the mean over labelled pixels, 0 where there are none.

    With `compile` the formula is compiled where a gradient is wanted; validation, whose photos differ in size, is not.

    Shape: logits (B, N, H, W), labels (B, H, W) of any integer type -> scalar, float32 or float64.
    Raises: UserError for an unknown name, a weight that is not positive, a negative gamma; when called, for a label
    of another tree.
    """
    losses = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    _check_spec(losses, h, gamma, node_weights)

    def mean_term(logits: Tensor, y: Tensor) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = None if node_weights is None else node_weights.to(z)
        terms = sum(weight * PIXEL_LOSSES[name](z, y, h, gamma, weights) for name, weight in losses.items())
        labelled = y != h.num_nodes
        return (terms * labelled).sum() / labelled.sum().clamp(min=1)

    compiled = torch.compile(mean_term, fullgraph=True) if compile else mean_term

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.dim() != 4 or logits.shape[1] != h.num_nodes or labels.shape != logits[:, 0].shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: expected "
                f"(B, {h.num_nodes}, H, W) and (B, H, W) for the tree {h.name!r}"
            )
        wants_gradient = torch.is_grad_enabled() and logits.requires_grad
        with torch.autocast(logits.device.type, enabled=False):
            return (compiled if wants_gradient else mean_term)(logits, h.index_of(labels))

    return criterion


def _check_spec(losses: Mapping[str, float], h: Hierarchy, gamma: float, node_weights: Tensor | None) -> None:
    if not losses:
        raise UserError(f"criterion: no loss is named; choose from {', '.join(PIXEL_LOSSES)}")
    for name, weight in losses.items():
        if name not in PIXEL_LOSSES:
            raise UserError(f"criterion: unknown loss {name!r}; choose from {', '.join(PIXEL_LOSSES)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"criterion: the weight of {name!r} is {weight!r}; it must be a positive number")
    if not 0 <= gamma < float("inf"):
        raise UserError(f"gamma: {gamma!r} is not a number of at least 0")
    if node_weights is not None and node_weights.shape != (h.num_nodes,):
        raise UserError(f"node weights: shape {tuple(node_weights.shape)}; the tree {h.name!r} needs ({h.num_nodes},)")


def _named(name: str) -> Callable[..., Tensor]:
    def loss(
        logits: Tensor, labels: Tensor, h: Hierarchy, gamma: float = 0.0, node_weights: Tensor | None = None
    ) -> Tensor:
        return build_criterion(name, h, gamma, node_weights)(logits, labels)

    loss.__name__ = name
    loss.__doc__ = f"The loss {name!r}; see `build_criterion`."
    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {name: _named(name) for name in PIXEL_LOSSES}


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
