"""The definitions in plain loops over pixels and nodes: slow, obvious, and what the fast code is held to.

Nothing here uses a table of `Hierarchy`, only its parents. Losses work on torch scalars, so autograd gives the
reference gradients.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from utils.hierarchy import Hierarchy
from utils.losses import HXE_ALPHA, SOFT_MARGIN_TAU


def tree_of(parents: list[int | None], names: list[str] | None = None, background: Sequence[int] = (), **keys):
    """A tree by the parent of each node; `keys` are others of a tree file."""
    nodes, depths = [], []
    for v, parent in enumerate(parents):
        node = {"id": v, "name": names[v] if names else f"node{v}", "parent": parent}
        nodes.append(node | {"colour": [v % 256, v // 256, 0], "background": v in background})
        depth, above = 1, parent
        while above is not None:
            depth, above = depth + 1, parents[above]
        depths.append(depth)
    levels = [f"level{level}" for level in range(1, max(depths) + 1)]
    return Hierarchy.from_dict({"name": "small", "ignore_index": 65535, "levels": levels, "nodes": nodes} | keys)


@functools.cache
def ancestors(v: int, h: Hierarchy) -> list[int]:
    """v and all above it, from v to its root."""
    chain = [v]
    while h.parents[chain[-1]] is not None:
        chain.append(h.parents[chain[-1]])
    return chain


def descendants(v: int, h: Hierarchy) -> list[int]:
    """v and all below it."""
    return [u for u in range(h.num_nodes) if v in ancestors(u, h)]


@functools.cache
def leaves(h: Hierarchy) -> list[int]:
    return [v for v in range(h.num_nodes) if v not in h.parents]


def is_positive(v: int, label: int, h: Hierarchy) -> bool:
    return label != h.ignore_index and v in ancestors(label, h)


def is_known(v: int, label: int, h: Hierarchy) -> bool:
    if label == h.ignore_index:
        return False
    return v == label or v not in descendants(label, h)


@functools.cache
def class_at(v: int, level: int, h: Hierarchy) -> int | None:
    """The class of node v at `level` (0 is level 1), None where v lies above it and is not a leaf."""
    depth = max(len(ancestors(u, h)) for u in range(h.num_nodes)) - level
    path = ancestors(v, h)[::-1]
    if len(path) >= depth:
        return path[depth - 1]
    return v if v in leaves(h) else None


def pixels(labels: Tensor) -> list[tuple[int, int, int]]:
    batch, height, width = labels.shape
    return [(b, i, j) for b in range(batch) for i in range(height) for j in range(width)]


# ---- losses ----------------------------------------------------------------------------------------------------


def loss(name: str, logits: Tensor, labels: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """Any of the losses: the mean of its pixels' losses over the labelled pixels, 0 if there are none."""
    known = [(b, i, j) for b, i, j in pixels(labels) if labels[b, i, j] != h.ignore_index]
    terms = [pixel_loss(name, logits[b, :, i, j], int(labels[b, i, j]), h, gamma) for b, i, j in known]
    return sum(terms, logits.sum() * 0) / max(len(known), 1)  # a zero that has a gradient


def pixel_loss(name: str, z: Tensor, label: int, h: Hierarchy, gamma: float) -> Tensor:
    def log_mass(v: int | None) -> Tensor:  # of all leaves where v is None, the parent of a root
        below = [z[u] for u in leaves(h) if v is None or v in ancestors(u, h)]
        return torch.stack(below).logsumexp(0) - torch.stack([z[u] for u in leaves(h)]).logsumexp(0)

    path, zero = ancestors(label, h), z.sum() * 0
    levels = range(max(len(ancestors(u, h)) for u in leaves(h)))
    classes = [c for c in (class_at(label, level, h) for level in levels) if c is not None]
    if name == "ce":
        return -log_mass(label)
    if name == "path_ce":
        return -sum(log_mass(v) for v in path)
    if name == "level_ce":
        return -sum((log_mass(c) for c in classes), zero) / len(levels)
    if name == "hxe":
        ratios = [log_mass(v) - log_mass(h.parents[v]) for v in path]
        return -sum(math.exp(-HXE_ALPHA * height(v, h)) * ratio for v, ratio in zip(path, ratios, strict=True))
    if name == "soft_margin":
        largest = max(distance(a, b, h) for a in leaves(h) for b in leaves(h))
        below = [u for u in leaves(h) if label in ancestors(u, h)]
        raised = [z[u] if u in below else z[u] + SOFT_MARGIN_TAU * distance(label, u, h) / largest for u in leaves(h)]
        return torch.stack(raised).logsumexp(0) - torch.stack([z[u] for u in below]).logsumexp(0)
    if name == "node_ce":
        present = [level for level in levels if class_at(label, level, h) is not None]
        rivals = [torch.stack([z[u] for u in {class_at(u, level, h) for u in leaves(h)}]) for level in present]
        pairs = zip(rivals, classes, strict=True)
        return sum((logits.logsumexp(0) - z[c] for logits, c in pairs), zero) / len(levels)
    return binary_pixel(name, z, label, h, gamma)


def height(v: int, h: Hierarchy) -> int:
    """The longest way from v down to a leaf."""
    return max(len(ancestors(u, h)) for u in descendants(v, h)) - len(ancestors(v, h))


def distance(u: int, v: int, h: Hierarchy) -> int:
    """Edges on the way from u to v, over one more node above all roots if need be."""
    up, down = ancestors(u, h), ancestors(v, h)
    shared = len([w for w in up if w in down])
    return len(up) + len(down) - 2 * shared


def binary_pixel(name: str, z: Tensor, label: int, h: Hierarchy, gamma: float) -> Tensor:
    total = z.sum() * 0
    for v in range(h.num_nodes):
        if not is_known(v, label, h):
            continue
        positive = is_positive(v, label, h)
        logit = z[v]
        if "tree_min" in name and positive:
            logit = min((z[u] for u in ancestors(v, h)), key=Tensor.item)
        elif name == "c_hmcnn" and positive:
            logit = max((z[u] for u in descendants(v, h) if is_positive(u, label, h)), key=Tensor.item)
        elif "tree_min" in name or name == "c_hmcnn":
            logit = max((z[u] for u in descendants(v, h)), key=Tensor.item)
        margin = logit if positive else -logit
        term = softplus(-margin)
        if "focal" in name:
            term = term * torch.sigmoid(-margin) ** gamma  # 1 - p_t, without cancellation
        total = total + term
    return total


# ---- decoding --------------------------------------------------------------------------------------------------


def path_score(rule: str, z: list[float], leaf: int, h: Hierarchy) -> float:
    path = [z[v] for v in ancestors(leaf, h)]
    scores = [sigmoid(value) for value in path]
    if rule == "mass":
        return sum(mass(v, z, h) - max(mass(u, z, h) for u in siblings(v, h)) for v in ancestors(leaf, h))
    if rule == "level_sum":
        levels = range(max(len(ancestors(u, h)) for u in leaves(h)))
        return sum(log_softmax_at(level, leaf, z, h) for level in levels)
    simple = {"logit_sum": sum(path), "prob_sum": sum(scores), "leaf": z[leaf], "tree_min": min(path)}
    return (simple | {"prob_mean": sum(scores) / len(scores)})[rule]


def log_softmax_at(level: int, leaf: int, z: list[float], h: Hierarchy) -> float:
    """log of the share of the leaf's class in a softmax over the logits of all classes of that level."""
    logits = [z[c] for c in {class_at(u, level, h) for u in leaves(h)}]
    highest = max(logits)
    return z[class_at(leaf, level, h)] - highest - math.log(sum(math.exp(logit - highest) for logit in logits))


def mass(v: int, z: list[float], h: Hierarchy) -> float:
    """log of the sum of exp(logit) over the leaves at or below v."""
    logits = [z[u] for u in leaves_below(v, h)]
    highest = max(logits)
    return highest + math.log(sum(math.exp(logit - highest) for logit in logits))


@functools.cache
def leaves_below(v: int, h: Hierarchy) -> list[int]:
    return [u for u in leaves(h) if u in descendants(v, h)]


@functools.cache
def siblings(v: int, h: Hierarchy) -> list[int]:
    """The nodes with v's parent, v among them; roots are siblings."""
    return [u for u in range(h.num_nodes) if h.parents[u] == h.parents[v]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


# ---- scores ----------------------------------------------------------------------------------------------------


def level_ious(leaf: Tensor, labels: Tensor, level: int, h: Hierarchy) -> dict[int, float | None]:
    """IoU of every class of a level, None for those in neither map; pixels without a class there are left out."""
    truth, answer = [], []
    for b, i, j in pixels(labels):
        label = int(labels[b, i, j])
        if label == h.ignore_index or class_at(label, level, h) is None:
            continue
        truth.append(class_at(label, level, h))
        answer.append(class_at(int(leaf[b, i, j]), level, h))
    ious: dict[int, float | None] = {}
    for v in sorted({class_at(leaf, level, h) for leaf in leaves(h)}):
        both = sum(t == v and a == v for t, a in zip(truth, answer, strict=True))
        either = sum(t == v or a == v for t, a in zip(truth, answer, strict=True))
        ious[v] = both / either if either else None
    return ious


def mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def violation_rate(logits: Tensor, labels: Tensor, h: Hierarchy) -> float | None:
    violated = pairs = 0
    for b, i, j in pixels(labels):
        if int(labels[b, i, j]) == h.ignore_index:
            continue
        for child, parent in enumerate(h.parents):
            if parent is not None:
                pairs += 1
                violated += bool(logits[b, child, i, j] > 0 >= logits[b, parent, i, j])
    return violated / pairs if pairs else None


def mistake_severity(leaf: Tensor, labels: Tensor, h: Hierarchy) -> float | None:
    heights = []
    for b, i, j in pixels(labels):
        label, answer = int(labels[b, i, j]), int(leaf[b, i, j])
        if label != h.ignore_index and label not in ancestors(answer, h):
            shared = [v for v in ancestors(label, h) if v in ancestors(answer, h)]
            heights.append(height(shared[0], h) if shared else 1 + max(height(v, h) for v in h.roots))
    return mean(heights)
