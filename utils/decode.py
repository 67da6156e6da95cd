"""Decoding: from node logits to one leaf a pixel. Upper levels follow from the leaf, so levels never contradict.

    leaf = DECODERS["logit_sum"](logits, h)     # (B, N, H, W) -> (B, H, W) leaf ids
    halves = h.level_of(leaf, 1)

Each rule scores every leaf by the nodes on its path, root to leaf, and takes the best; on a tie the lowest id.

    logit_sum   sum of logits. Under independent binary cross-entropies this is the most probable path:
                the product of s on the path and 1 - s off it is a constant times exp(sum of logits).
    prob_sum    sum of scores: what the paper and its code do. Long paths win too often.
    prob_mean   mean of scores.
    leaf        the leaf's logit alone.
    tree_min    the lowest logit on the path.
    mass        down the tree by the softmax over the leaves: at each node to the child with most of it below. For `ce`
                and its kin, which train the leaves alone: parts share the mass of a body that is sure.
    level_sum   sum over the levels of the log-probability of the leaf's class there, by a softmax over that level's own
                logits: for `node_ce`, which trains those. `level_ce` trains leaf logits alone, so `mass` is its rule.

Source: Li et al., "Deep Hierarchical Semantic Segmentation", CVPR 2022, for prob_sum.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from utils.hierarchy import Hierarchy
from utils.losses import log_mass

RootBias = Tensor | Sequence[float] | None


# ---- the rules: (N, P) -> (N, P), the score of the path to each node ----------------------------------------------


def down(values: Tensor, h: Hierarchy, join: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """Each node's values from its root down to itself, joined: added up, or another way."""
    rows = list(values.unbind())
    for parent, child in h.edges:
        rows[child] = join(rows[child], rows[parent])
    return torch.stack(rows)


def lengths(like: Tensor, h: Hierarchy) -> Tensor:
    return h.cached("lengths", like.device, like.dtype, lambda: torch.tensor([[len(path)] for path in h.paths]))


def mass_down(logits: Tensor, h: Hierarchy) -> Tensor:
    """The log ratios by which siblings have more mass, added up along each path: 0 for the greedy path, else less.

    A bias of a root turns the choice between roots alone.
    """
    rows = log_mass(logits.unbind(), h)
    for siblings in (h.roots, *filter(None, h.children)):
        most = torch.stack([rows[v] for v in siblings]).amax(0)
        for v in siblings:
            rows[v] = rows[v] - most
    return down(torch.stack(rows), h)


def level_sum(logits: Tensor, h: Hierarchy) -> Tensor:
    """Right for leaves alone, the only nodes with a class at every level."""
    rows = list(logits.unbind())
    levels = [torch.stack([rows[v] for v in classes]).log_softmax(0) for classes in h.level_classes]
    for leaf in h.leaves:
        rows[leaf] = sum(p[c.index(t[leaf])] for p, c, t in zip(levels, h.level_classes, h.level_tables, strict=True))
    return torch.stack(rows)


PATH_SCORES: dict[str, Callable[[Tensor, Hierarchy], Tensor]] = {
    "logit_sum": down,
    "prob_sum": lambda logits, h: down(logits.sigmoid(), h),
    "prob_mean": lambda logits, h: down(logits.sigmoid(), h) / lengths(logits, h),
    "leaf": lambda logits, h: logits,
    "tree_min": lambda logits, h: down(logits, h, torch.minimum),
    "mass": mass_down,
    "level_sum": level_sum,
}


def leaf_scores(rule: str, logits: Tensor, h: Hierarchy) -> Tensor:
    """What `rule` makes of the path to each leaf, in the order of `h.leaves`. Shape: (N, P) -> (leaves, P)."""
    return PATH_SCORES[rule](logits, h).index_select(0, h.leaf_index(logits.device))


@torch.no_grad()
def decode(rule: str, logits: Tensor, h: Hierarchy, root_bias: RootBias = None) -> Tensor:
    """The best leaf of each pixel by `rule`, after adding to each leaf's score the bias of its root.

    `root_bias` has one number a root, in the order of `h.roots`, in the unit of the rule's score: logits, but
    probabilities for `prob_sum` and `prob_mean`.

    Shape: (B, N, H, W) -> (B, H, W), uint8 where 256 ids suffice (an eighth of the memory traffic), else int64.
    """
    if logits.dim() != 4 or logits.shape[1] != h.num_nodes:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit: expected (B, {h.num_nodes}, H, W)")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    bias = leaf_bias(root_bias, h, logits.device, dtype)
    leaf = logits.new_empty(logits[:, 0].shape, dtype=torch.uint8 if h.num_nodes <= 256 else torch.int64)
    for sample, answer in zip(logits, leaf, strict=True):  # one by one: photos may be large
        scores = leaf_scores(rule, sample.flatten(1).to(dtype), h)
        best = (scores if bias is None else scores + bias).max(0).indices  # argmax takes six times as long on a CPU
        answer.copy_(h.leaf_index(logits.device)[best].view(answer.shape))
    return leaf


def probabilities(rule: str, logits: Tensor, h: Hierarchy) -> Tensor:
    """Each node's probability as the loss meant it whose own rule this is, whatever rule decodes.

    `mass`: its mass of the softmax over the leaves; `level_sum`: the softmax over the lowest level it stands at; all
    others: its sigmoid. Shape: (B, N, H, W), as the result, which is float32 or float64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if rule == "mass":
        return torch.stack(log_mass(logits.unbind(1), h), 1).exp()
    if rule != "level_sum":
        return logits.sigmoid()
    result = torch.empty_like(logits)
    for classes in reversed(h.level_classes):
        result[:, classes] = logits[:, classes].softmax(1)
    return result


def leaf_bias(root_bias: RootBias, h: Hierarchy, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The bias of each leaf's root. Shape: one number a root -> (leaves, 1)."""
    if root_bias is None:
        return None
    bias = torch.as_tensor(root_bias, dtype=dtype, device=device)
    if bias.shape != (len(h.roots),):
        names = ", ".join(h.names[root] for root in h.roots)
        raise ValueError(f"root_bias has shape {tuple(bias.shape)}; expected one number for each of: {names}")
    return bias[[h.roots.index(h.paths[leaf][0]) for leaf in h.leaves]].unsqueeze(1)


DECODERS: dict[str, Callable[..., Tensor]] = {rule: partial(decode, rule) for rule in PATH_SCORES}
