"""Random trees, random labels at any depth: the fast code equals the loops of reference.py."""

from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import reference
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy
from utils.losses import LOSSES
from utils.metrics import LevelScores

MAX_NODES, MAX_DEPTH = 60, 6
thorough = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])


seeds = st.integers(0, 2**32 - 1)


def random_tree(random: Random) -> Hierarchy:
    """A forest of 1 to 60 nodes, depth 1 to 6, unequal depths, single children, ids in any order.

    Hypothesis draws the seed alone: drawn node by node, most examples came out tiny or as near copies.
    """
    count, max_depth = random.randint(1, MAX_NODES), random.randint(1, MAX_DEPTH)
    root_share = random.choice([0.05, 0.2, 0.5])
    ids = random.sample(range(count), count)  # in the order in which nodes are made
    parents: list[int | None] = [None] * count
    depths = [1] * count
    for made, v in enumerate(ids):
        inner = [u for u in ids[:made] if depths[u] < max_depth]
        if inner and random.random() > root_share:
            parents[v] = random.choice(inner)
            depths[v] = depths[parents[v]] + 1
    lonely = [v for v in range(count) if parents[v] is None and v not in parents]
    background = lonely[: random.randint(0, 1)]
    return reference.tree_of(parents, background=background, ignore_index=random.choice([count, 255]))


def random_case(seed: int) -> tuple[Hierarchy, torch.Tensor, torch.Tensor]:
    """A tree, float64 logits (B, N, H, W) and labels (B, H, W): mixed, sometimes all void or empty."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    h, batch = random_tree(random), random.choice([1, 2, 4])
    height, width = random.choice([(2, 2), (1, 3), (3, 2), (1, 1), (2, 2), (0, 2)])
    logits = torch.randn(batch, h.num_nodes, height, width, generator=generator, dtype=torch.float64) * 4
    labels = torch.randint(0, h.num_nodes + 1, (batch, height, width), generator=generator)
    void = (labels == h.num_nodes) | (random.random() < 0.1)
    return h, logits, labels.masked_fill(void, h.ignore_index)


cases = seeds.map(random_case)


@pytest.mark.parametrize("name", sorted(LOSSES))
@settings(thorough, max_examples=20)
@given(case=cases, gamma=st.sampled_from([0.0, 0.5, 2.0]))
def test_losses_and_gradients_equal_the_loops(case: tuple, name: str, gamma: float) -> None:
    h, logits, labels = case
    naive = logits.clone().requires_grad_()
    expected = reference.loss(name, naive, labels, h, gamma)
    expected.backward()
    for dtype, rtol, atol in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-6)):
        fast = logits.to(dtype, copy=True).requires_grad_()
        value = LOSSES[name](fast, labels, h, gamma)
        value.backward()
        torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=rtol, atol=atol)
        torch.testing.assert_close(fast.grad.double(), naive.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rule", sorted(DECODERS))
@settings(thorough, max_examples=30)
@given(case=cases, biased=st.booleans())
def test_decoding_equals_the_loops(case: tuple, rule: str, biased: bool) -> None:
    h, logits, _ = case
    bias = [0.1 * r for r in range(len(h.roots))] if biased else None
    answer = DECODERS[rule](logits, h, bias)
    for b, i, j in reference.pixels(answer):
        z = logits[b, :, i, j].tolist()
        shift = {v: 0.0 if bias is None else bias[h.roots.index(h.paths[v][0])] for v in h.leaves}
        scores = {v: reference.path_score(rule, z, v, h) + shift[v] for v in h.leaves}
        best = [v for v in h.leaves if scores[v] == pytest.approx(max(scores.values()), rel=1e-12, abs=1e-12)]
        assert answer[b, i, j] == best[0], "of equally good ones the lowest id"


@thorough
@given(cases, st.sampled_from(sorted(DECODERS)))
def test_scores_equal_counting(case: tuple, rule: str) -> None:
    h, logits, labels = case
    leaf = DECODERS[rule](logits, h)
    meter = LevelScores(h)
    for b in range(len(leaf)):
        meter.update(leaf[b : b + 1], labels[b : b + 1], logits[b : b + 1])
    scores = meter.compute()
    assert Hierarchy.from_dict(h.to_dict()).fingerprint == h.fingerprint
    for level in range(h.num_levels):
        ious = reference.level_ious(leaf, labels, level, h)
        assert scores["levels"][level]["IoU"] == {h.names[v]: iou for v, iou in ious.items()}
        assert scores[f"mIoU{level + 1}_with_background"] == pytest.approx(reference.mean(ious.values()))
        foreground = [iou for v, iou in ious.items() if v not in h.background]
        assert scores[f"mIoU{level + 1}"] == pytest.approx(reference.mean(foreground))
    assert scores["violation_rate"] == reference.violation_rate(logits, labels, h)
    assert scores["mistake_severity"] == pytest.approx(reference.mistake_severity(leaf, labels, h))
