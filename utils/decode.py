"""Decoding: from node logits to one leaf a pixel. Upper levels follow from the leaf, so levels never contradict.

    leaf = DECODERS["logit_sum"](logits, h)     # (B, N, H, W) -> (B, H, W) leaf ids
    halves = h.level_of(leaf, 1)

Each rule scores every leaf by the nodes on its path, root to leaf, and takes the best; on a tie the lowest id.

    logit_sum   sum of logits. Under independent binary cross-entropies this is the most probable path:
                the product of s on the path and 1 - s off it is a constant times exp(sum of logits). The default.
    prob_sum    sum of scores: what the paper and its code do. Long paths win too often.
    prob_mean   mean of scores.
    leaf        the leaf's logit alone.
    tree_min    the lowest logit on the path.
    mass        down the tree by the softmax over the leaves: at each node to the child with most of it below. For `ce`
                and `path_ce`, which train the leaves alone: parts share the mass of a body that is sure.

Source: Li et al., "Deep Hierarchical Semantic Segmentation", CVPR 2022, for prob_sum.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.chunks import chunks
from utils.hierarchy import Hierarchy


def _sum_down(values: Tensor, h: Hierarchy) -> Tensor:
    """Each node's sum over its path. In place: the values of (N, P) are not needed afterwards."""
    rows = values.unbind()
    for parent, child in h.edges:
        rows[child].add_(rows[parent])
    return values


def _min_down(values: Tensor, h: Hierarchy) -> Tensor:
    rows = values.unbind()
    for parent, child in h.edges:
        torch.minimum(rows[child], rows[parent], out=rows[child])
    return values


def _mean_down(values: Tensor, h: Hierarchy) -> Tensor:
    lengths = h.cached("path_lengths", values.device, values.dtype, lambda: _path_lengths(h))
    return _sum_down(values, h).div_(lengths)


def _mass_down(logits: Tensor, h: Hierarchy) -> Tensor:
    """The log ratios by which siblings have more mass, added up along each path: 0 for the greedy path, else less.

    Masses are sums of exp(leaf logit); their common divisor cancels among siblings. A bias of a root turns the choice
    between roots alone.
    """
    rows = logits.unbind()
    for parent in {parent for parent, _ in h.edges}:
        rows[parent].fill_(-torch.inf)
    for parent, child in reversed(h.edges):
        torch.logaddexp(rows[parent], rows[child], out=rows[parent])
    for siblings in (h.roots, *filter(None, h.children)):
        most = torch.stack([rows[v] for v in siblings]).amax(0)
        for v in siblings:
            rows[v].sub_(most)
    return _sum_down(logits, h)


def _path_lengths(h: Hierarchy) -> Tensor:
    return torch.tensor([[len(path)] for path in h.paths])


# (N, P) logits, which may be overwritten -> (N, P) scores of paths
_PATH_SCORES: dict[str, Callable[[Tensor, Hierarchy], Tensor]] = {
    "logit_sum": _sum_down,
    "prob_sum": lambda logits, h: _sum_down(logits.sigmoid_(), h),
    "prob_mean": lambda logits, h: _mean_down(logits.sigmoid_(), h),
    "leaf": lambda logits, h: logits,
    "tree_min": _min_down,
    "mass": _mass_down,
}


def leaf_scores(rule: str, logits: Tensor, h: Hierarchy) -> Tensor:
    """What `rule` makes of the path to each leaf, in the order of `h.leaves`. Overwrites `logits`.

    Shape: (N, P) -> (leaves, P).
    """
    return _PATH_SCORES[rule](logits, h).index_select(0, h.leaf_index(logits.device))


@torch.no_grad()
def decode(rule: str, logits: Tensor, h: Hierarchy, root_bias: Tensor | Sequence[float] | None = None) -> Tensor:
    """The best leaf of each pixel by `rule`, after adding to each leaf's score the bias of its root.

    `root_bias` has one number a root, in the order of `h.roots`, in the unit of the rule's score: logits, but
    probabilities for `prob_sum` and `prob_mean`.

    Shape: (B, N, H, W) -> (B, H, W), uint8 where 256 ids suffice (an eighth of the memory traffic), else int64.
    """
    if logits.dim() != 4 or logits.shape[1] != h.num_nodes:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit: expected (B, {h.num_nodes}, H, W)")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = logits.flatten(2)  # (B, N, HW)
    ids = torch.uint8 if h.num_nodes <= 256 else torch.int64
    leaf = torch.empty(flat.shape[0], flat.shape[2], dtype=ids, device=logits.device)
    leaves = h.leaf_index(logits.device)
    bias = leaf_bias(root_bias, h, logits.device, dtype)
    for samples, pixels in chunks(flat.shape, flat.device):
        part = flat[samples, :, pixels].transpose(0, 1)  # (N, b, p)
        scores = leaf_scores(rule, part.to(dtype, copy=True).flatten(1), h)
        best = best_row(scores if bias is None else scores.add_(bias))
        leaf[samples, pixels] = leaves.index_select(0, best).to(ids).view(part.shape[1:])
    return leaf.unflatten(1, logits.shape[2:])


def leaf_bias(
    root_bias: Tensor | Sequence[float] | None, h: Hierarchy, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The bias of each leaf's root. Shape: one number a root -> (leaves, 1)."""
    if root_bias is None:
        return None
    bias = torch.as_tensor(root_bias, dtype=dtype, device=device)
    if bias.shape != (len(h.roots),):
        names = ", ".join(h.names[root] for root in h.roots)
        raise ValueError(f"root_bias has shape {tuple(bias.shape)}; expected one number for each of: {names}")
    return bias[[h.roots.index(h.paths[leaf][0]) for leaf in h.leaves]].unsqueeze(1)


def best_row(scores: Tensor) -> Tensor:
    """The first row that holds the column's maximum. Overwrites `scores`. Shape: (L, P) -> (P,) int64.

    Four vectorised passes: measured on a CPU, `max(0).indices` takes four times as long and `argmax(0)` 25 times.
    """
    rows = len(scores)
    countdown = torch.arange(rows, 0, -1, device=scores.device, dtype=scores.dtype).unsqueeze(1)
    is_best = scores.eq_(scores.amax(0))  # in place: 1.0 and 0.0, without a detour over bool
    # a column of NaN has no best row and counts down to 0: give it the last row
    return (rows - is_best.mul_(countdown).amax(0)).long().clamp_(max=rows - 1)


def _named(rule: str) -> Callable[..., Tensor]:
    def decoder(logits: Tensor, h: Hierarchy, root_bias: Tensor | Sequence[float] | None = None) -> Tensor:
        return decode(rule, logits, h, root_bias)

    decoder.__name__ = rule
    decoder.__doc__ = f"`decode` with the rule {rule!r}."
    return decoder


DECODERS: dict[str, Callable[..., Tensor]] = {rule: _named(rule) for rule in _PATH_SCORES}
