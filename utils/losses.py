"""Losses on a label tree, from integer labels at any depth.

    loss = LOSSES["tree_min"](logits, labels, h)
    criterion = build_criterion({"tree_min": 1.0, "bce": 1.0}, h, gamma=0.0)

Each is a plain function (z, y, h, gamma) -> (B, H, W), a term per pixel; autograd differentiates.

    z      logits in float32 or float64. Shape: (B, N, H, W)
    y      labels as columns of the tables of `Hierarchy`: the node, N for void. Shape: (B, H, W) int64
    gamma  exponent of the focal forms; the others leave it alone

What lies below an inner label is unknown, and no loss asks anything of it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.hierarchy import Hierarchy

Spec = str | Mapping[str, float]
Criterion = Callable[[Tensor, Tensor], Tensor]
FAR = 1e30  # beyond any logit, and finite: 0 times it is 0
HXE_ALPHA = 0.5  # of `hxe`: how fast the weight falls with the height of a node
SOFT_MARGIN_TAU = 1.0  # of `soft_margin`: the margin, in logits, of the leaf that is farthest from the label


# ---- one sigmoid a node ------------------------------------------------------------------------------------------
# How wrong a node is: `turns` times its logit, with -1 on the label's path, +1 off it, 0 unknown. Its term is softplus
# of that, which needs no epsilon. Min and max commute with sigmoid, so they are taken on logits:
# max(a, b) is a + relu(b - a), which is fast on a CPU and leaves a tie to the node itself.


def bce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """Binary cross-entropy of every node, summed. An inner label: of all nodes but those below it."""
    turns = look_up(-h.signs(z.device, z.dtype), y)
    return node_terms(turns * z, turns, gamma)


def tree_min(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """`bce` of the lowest score above a positive node and the highest below a negative one, itself counted.

    An inner label: as `bce`; no minimum or maximum reaches below it.
    Source: Li et al., "Deep Hierarchical Semantic Segmentation", CVPR 2022; we sum over nodes where they average.
    """
    turns = look_up(-h.signs(z.device, z.dtype), y)
    wrong, positive, negative = list((turns * z).unbind(1)), (-turns).relu().unbind(1), turns.relu().unbind(1)
    for parent, child in h.edges:
        wrong[child] = wrong[child] + positive[child] * (wrong[parent] - wrong[child]).relu()
    for parent, child in reversed(h.edges):
        wrong[parent] = wrong[parent] + negative[parent] * (wrong[child] - wrong[parent]).relu()
    return node_terms(torch.stack(wrong, 1), turns, gamma)


def c_hmcnn(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """`bce` of the highest true score below a positive node and of any score below a negative one, itself counted.

    An inner label: as `bce`; it is itself the lowest of the true nodes.
    Source: Giunchiglia and Lukasiewicz, "Coherent Hierarchical Multi-Label Classification Networks", NeurIPS 2020.
    """
    turns = look_up(-h.signs(z.device, z.dtype), y)
    wrong, positive, negative = list((turns * z).unbind(1)), (-turns).relu().unbind(1), turns.relu().unbind(1)
    for parent, child in reversed(h.edges):
        more = wrong[child] - wrong[parent]
        wrong[parent] = wrong[parent] + negative[parent] * more.relu() - positive[child] * (-more).relu()
    return node_terms(torch.stack(wrong, 1), turns, gamma)


def node_terms(wrong: Tensor, turns: Tensor, gamma: float) -> Tensor:
    """Sum over known nodes of softplus(wrong), times (1 - p)^gamma in the focal forms. Shape: (B, N, H, W), twice."""
    terms = F.softplus(wrong) * turns.abs()
    if gamma:
        terms = terms * (gamma * F.logsigmoid(wrong)).exp()  # whose slope stays finite where 1 - p is 0
    return terms.sum(1)


def look_up(table: Tensor, y: Tensor) -> Tensor:
    """Each label's column. Shape: (K, N + 1), (B, H, W) -> (B, K, H, W)."""
    columns = y.flatten(1).unsqueeze(1).expand(-1, len(table), -1)
    return table.expand(len(y), -1, -1).gather(2, columns).view(len(y), len(table), *y.shape[1:])


# ---- one softmax over the leaves: m(v) is its mass on the leaves at or below v ------------------------------------


def ce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """-log m(label). An inner label: the mass of all its leaves, whichever it is."""
    return -log_sum_below(leaf_logits(z, h).log_softmax(1), y, h)


def path_ce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """Sum of -log m(v) over the label's path. An inner label: over its own, shorter path."""
    return mass_terms(z, y, h.signs(z.device, z.dtype).clamp(min=0), h)


def level_ce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """Mean over the levels of -log m(class of the label there). An inner label: 0 at the levels below it."""
    return mass_terms(z, y, h.cached("level_shares", z.device, z.dtype, lambda: _level_shares(h)), h)


def _level_shares(h: Hierarchy) -> Tensor:
    """The share of the levels at which node c is the class of label v. Shape: (N, N + 1)."""
    classes = torch.tensor(h.level_tables).clamp(max=h.num_nodes)  # (L, N), N where the label has none
    return F.pad(F.one_hot(classes, h.num_nodes + 1).double().mean(0)[:, :-1].t(), (0, 1))


def hxe(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """-sum over the label's path of exp(-alpha * height of v) * log(m(v) / m(parent of v)), a root's parent having 1.

    An inner label: over its own, shorter path.
    Source: Bertinetto et al., "Making Better Mistakes", CVPR 2020.
    """
    discount = h.cached("hxe", z.device, z.dtype, lambda: (-HXE_ALPHA * torch.tensor([h.heights]).double()).exp().t())
    return mass_terms(z, y, h.signs(z.device, z.dtype).clamp(min=0) * discount, h, conditional=True)


def soft_margin(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """`ce` with tau * (distance in the tree to the label, over its largest) added to each leaf's logit in the divisor.

    An inner label: the leaves below it stand at distance 0.
    Source: Valmadre, "Hierarchical Classification at Multiple Operating Points", NeurIPS 2022.
    """
    logits = leaf_logits(z, h)
    margin = look_up(h.cached("soft_margin", z.device, z.dtype, lambda: _soft_margins(h)), y)
    return (logits + margin).logsumexp(1) - log_sum_below(logits, y, h)


def _soft_margins(h: Hierarchy) -> Tensor:
    """tau * distance of leaf and label over the largest of two leaves; 0 below the label. Shape: (leaves, N + 1)."""
    largest = max(1, *(h.distance(a, b) for a in h.leaves for b in h.leaves))
    distances = [[h.distance(leaf, v) for v in range(h.num_nodes)] + [0] for leaf in h.leaves]
    return SOFT_MARGIN_TAU * torch.tensor(distances).double() * (1 - h.leaves_below()) / largest


def node_ce(z: Tensor, y: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    """Mean over the levels of the cross-entropy of a softmax over the level's own logits.

    An inner label: 0 at the levels below it.
    Source: the released code of Li et al., beside their focal Tree-Min.
    """
    rows, total = z.unbind(1), 0
    for level, classes in enumerate(h.level_classes):
        places = [classes.index(c) if c in classes else -1 for c in (*h.level_tables[level], None)]
        target = h.cached(("places", level), z.device, torch.int64, lambda places=places: torch.tensor(places))[y]
        logits = torch.stack([rows[v] for v in classes], 1)
        total = total + F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
    return total / h.num_levels


def mass_terms(z: Tensor, y: Tensor, factors: Tensor, h: Hierarchy, conditional: bool = False) -> Tensor:
    """Sum over nodes v of factors[v, label] * -log m(v), or of -log(m(v) / m(parent)). Shape: (N, N + 1) factors."""
    rows = log_mass(z.unbind(1), h)
    for parent, child in reversed(h.edges) if conditional else ():
        rows[child] = rows[child] - rows[parent]
    return -sum(row * factor for row, factor in zip(rows, look_up(factors, y).unbind(1), strict=True))


def log_mass(rows: Sequence[Tensor], h: Hierarchy) -> list[Tensor]:
    """log m(v) of each node, from the leaves up. Shape: N times any, as the result."""
    rows = list(rows)
    for v, row in zip(h.leaves, torch.stack([rows[v] for v in h.leaves]).log_softmax(0), strict=True):
        rows[v] = row
    for v in reversed(h.preorder):
        if h.children[v]:
            rows[v] = torch.stack([rows[child] for child in h.children[v]]).logsumexp(0)
    return rows


def leaf_logits(z: Tensor, h: Hierarchy) -> Tensor:
    # slices, as far as ids follow each other: index_select's backward adds with atomics on a GPU
    runs = [i for i, v in enumerate(h.leaves) if i == 0 or v != h.leaves[i - 1] + 1] + [len(h.leaves)]
    return torch.cat([z[:, h.leaves[i] : h.leaves[j - 1] + 1] for i, j in itertools.pairwise(runs)], 1)


def log_sum_below(values: Tensor, y: Tensor, h: Hierarchy) -> Tensor:
    """log of the sum of exp over the leaves at or below the label. Shape: (B, leaves, H, W) -> (B, H, W)."""
    outside = h.cached("outside", values.device, values.dtype, lambda: (h.leaves_below() - 1) * FAR)
    values = values + look_up(outside, y)
    # what logsumexp does, but a CPU's exp is slow far below 0, and beyond -80 a term is lost in the sum
    highest = values.detach().amax(1, keepdim=True)
    return (values - highest).clamp(min=-80).exp().sum(1).log() + highest.squeeze(1)


# ---- by name, and sums of them -----------------------------------------------------------------------------------
PIXEL_LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss for loss in (bce, tree_min, c_hmcnn, ce, path_ce, level_ce, hxe, soft_margin, node_ce)
} | {"focal": bce, "focal_tree_min": tree_min}  # these alone are given gamma


def build_criterion(spec: Spec, h: Hierarchy, gamma: float = 0.0, compile: bool = False) -> Criterion:
    """A loss by name, or a sum of losses by name and weight: the mean over labelled pixels, 0 where there are none.

    With `compile` the formula is compiled where a gradient is wanted; validation, whose photos differ in size, is not.

    Shape: logits (B, N, H, W), labels (B, H, W) of any integer type -> scalar, float32 or float64.
    Raises: UserError for a spec that makes no sense and, when called on a CPU, for a label of another tree.
    """
    losses = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    for name, weight in losses.items():
        if name not in PIXEL_LOSSES or not 0 < weight < float("inf"):
            known = ", ".join(PIXEL_LOSSES)
            raise UserError(f"criterion: {name!r} with weight {weight!r}; expected a weight above 0, of one of {known}")

    def mean_term(logits: Tensor, y: Tensor) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        terms = [
            factor * PIXEL_LOSSES[name](z, y, h, gamma if name.startswith("focal") else 0.0)
            for name, factor in losses.items()
        ]
        labelled = y != h.num_nodes
        return (sum(terms) * labelled).sum() / labelled.sum().clamp(min=1)

    compiled = torch.compile(mean_term, fullgraph=True) if compile else mean_term

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.dim() != 4 or logits.shape[1] != h.num_nodes or labels.shape != logits[:, 0].shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: expected "
                f"(B, {h.num_nodes}, H, W) and (B, H, W) for the tree {h.name!r}"
            )
        formula = compiled if torch.is_grad_enabled() and logits.requires_grad else mean_term
        with torch.autocast(logits.device.type, enabled=False):
            return formula(logits, h.index_of(labels))

    return criterion


def _loss(name: str, logits: Tensor, labels: Tensor, h: Hierarchy, gamma: float = 0.0) -> Tensor:
    return build_criterion(name, h, gamma)(logits, labels)


LOSSES: dict[str, Callable[..., Tensor]] = {name: partial(_loss, name) for name in PIXEL_LOSSES}
