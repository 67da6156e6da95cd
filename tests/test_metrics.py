"""Scores, counted by hand and by loops."""

import json
from pathlib import Path

import pytest
import torch

from tests import reference
from utils.decode import probabilities
from utils.hierarchy import Hierarchy
from utils.metrics import BINS, LevelScores

TREES = Path(__file__).resolve().parents[1] / "configs" / "hierarchies"
VOID = 255


@pytest.fixture(scope="module")
def h() -> Hierarchy:
    return Hierarchy.load(TREES / "pascal_part.json")


def maps(h: Hierarchy, seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predicted leaves, labels at any depth or void, logits."""
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.tensor(h.leaves)
    leaf = leaves[torch.randint(0, len(leaves), shape, generator=generator)]
    labels = torch.randint(0, h.num_nodes + 1, shape, generator=generator)
    labels = labels.masked_fill(labels == h.num_nodes, h.ignore_index)
    logits = torch.randn(shape[0], h.num_nodes, *shape[1:], generator=generator)
    return leaf.to(torch.uint8), labels.to(torch.uint8), logits


def scored(leaf: list[int], labels: list[int], h: Hierarchy) -> dict:
    meter = LevelScores(h)
    meter.update(torch.tensor([[leaf]]), torch.tensor([[labels]]))
    return meter.compute()


def test_scores_of_six_pixels_by_hand(h: Hierarchy) -> None:
    #         background  head as torso  torso  up_leg as head  head  void
    scores = scored([0, 2, 2, 4, 4, 1], [0, 4, 2, 5, 4, VOID], h)
    parts, halves, body = scores["levels"]
    assert parts["IoU"] == {
        "background": 1.0,
        "low_hand": None,
        "torso": 1 / 2,
        "low_leg": None,
        "head": 1 / 3,
        "up_leg": 0.0,
        "up_hand": None,
    }
    assert parts["absent"] == ["low_hand", "low_leg", "up_hand"]
    assert scores["mIoU1"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert scores["mIoU1_with_background"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)
    assert halves["IoU"] == {"background": 1.0, "upper_body": 3 / 4, "lower_body": 0.0}
    assert scores["mIoU2"] == pytest.approx(3 / 8)
    assert body["IoU"] == {"background": 1.0, "body": 1.0}
    assert [level["pixel_accuracy"] for level in scores["levels"]] == [3 / 5, 4 / 5, 1.0]
    assert scores["pixel_accuracy"] == 3 / 5
    assert [level["name"] for level in scores["levels"]] == ["parts", "halves", "body"]


def test_an_inner_label_counts_at_its_level_and_above_alone(h: Hierarchy) -> None:
    upper, body, head = 8, 7, 4
    scores = scored([head, head, 0], [upper, body, head], h)
    assert [level["pixels"] for level in scores["levels"]] == [1, 2, 3]
    assert scores["levels"][0]["IoU"]["head"] == 0  # the missed head; its other answers have no truth here
    assert scores["levels"][1]["IoU"]["upper_body"] == 1 / 2
    assert scores["levels"][2]["IoU"]["body"] == 2 / 3


def test_a_leaf_above_a_level_stands_for_itself() -> None:
    h = Hierarchy.load(TREES / "synthetic_deep.json")
    plant = h.names.index("plant")
    scores = scored([plant], [plant], h)
    assert [level["IoU"].get("plant") for level in scores["levels"]] == [1, 1, 1, 1, None]
    assert scores["levels"][4]["IoU"]["living"] == 1


def test_all_background_has_no_score_without_background(h: Hierarchy) -> None:
    scores = scored([0, 0], [0, 0], h)
    assert scores["mIoU1"] is None
    assert scores["mIoU1_with_background"] == 1
    assert scored([0, 1], [0, 0], h)["mIoU1"] == 0


def test_nothing_seen_gives_none_everywhere(h: Hierarchy) -> None:
    for scores in (LevelScores(h).compute(), scored([1, 2], [VOID, VOID], h)):
        assert scores["mIoU1"] is scores["mIoU3_with_background"] is scores["pixel_accuracy"] is None
        assert scores["violation_rate"] is None
        assert scores["levels"][0]["absent"] == list(h.names[:7])


def test_violations_by_hand(h: Hierarchy) -> None:
    """A score of exactly 0.5 is not above 0.5: not for a child, and so a violation for its parent."""
    logits = torch.full((1, 10, 1, 3), -1.0)
    logits[0, 4, 0, 0] = 1.0  # head above 0.5, upper_body below: one violation
    logits[0, [8, 7], 0, 1] = torch.tensor([1.0, 0.0])  # upper_body above, body at 0.5: one violation
    logits[0, 4, 0, 2] = 1.0  # void: not counted
    meter = LevelScores(h)
    meter.update(torch.zeros(1, 1, 3).int(), torch.tensor([[[0, 0, VOID]]]), logits)
    assert meter.compute()["violation_rate"] == 2 / (2 * 8)


def test_a_mistake_is_as_severe_as_label_and_answer_meet_high(h: Hierarchy) -> None:
    head, torso, leg, upper = 4, 2, 5, 8
    assert scored([torso], [head], h)["mistake_severity"] == 1  # they meet at upper_body
    assert scored([leg], [head], h)["mistake_severity"] == 2  # at body
    assert scored([0], [head], h)["mistake_severity"] == 3  # above all roots
    assert scored([leg, head, 0], [upper, upper, 0], h)["mistake_severity"] == 2  # a head is no mistake for upper_body
    assert scored([head, 0], [upper, VOID], h)["mistake_severity"] is None


def test_calibration_errors_by_hand(h: Hierarchy) -> None:
    """Four heads answered at 0.9, three of them right; body at 0.75 on all four, right on all."""
    logits = torch.full((1, 10, 1, 5), -20.0)
    logits[0, 4] = torch.tensor(0.9).logit()
    logits[0, 7] = torch.tensor(0.75).logit()
    meter = LevelScores(h)
    meter.update(torch.full((1, 1, 5), 4), torch.tensor([[[4, 4, 4, 2, 8]]]), logits)  # the last tells of no leaf
    scores = meter.compute()
    assert scores["ECE_leaf"] == pytest.approx(0.9 - 0.75, abs=1e-4)
    assert scores["ECE_body"] == pytest.approx(0.25, abs=1e-4)
    assert scores["ECE_background"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("rule", ["logit_sum", "mass", "level_sum"])
def test_severity_and_calibration_equal_the_loops(rule: str) -> None:
    h = Hierarchy.load(TREES / "synthetic_deep.json")
    leaf, labels, logits = maps(h, 3, 2, 12, 12)
    meter = LevelScores(h, own_rule=rule)
    meter.update(leaf, labels, logits)
    scores, p = meter.compute(), probabilities(rule, logits, h)
    assert scores["mistake_severity"] == pytest.approx(reference.mistake_severity(leaf, labels, h))
    assert ((p >= 0) & (p <= 1)).all()
    if rule == "mass":
        torch.testing.assert_close(p[:, list(h.roots)].sum(1), torch.ones(2, 12, 12))
    leaf = leaf.long()
    known = [(pixel, int(labels[pixel])) for pixel in reference.pixels(labels) if labels[pixel] != VOID]
    fine = [(b, i, j, label) for (b, i, j), label in known if label in h.leaves]
    sure, right = (
        [p[b, leaf[b, i, j], i, j].item() for b, i, j, _ in fine],
        [bool(leaf[b, i, j] == v) for b, i, j, v in fine],
    )
    assert scores["ECE_leaf"] == pytest.approx(reference.calibration_error(sure, right, BINS), abs=1e-4)
    for root in h.roots:
        sure = [p[b, root, i, j].item() for (b, i, j), _ in known]
        right = [root in reference.ancestors(label, h) for _, label in known]
        assert scores[f"ECE_{h.names[root]}"] == pytest.approx(reference.calibration_error(sure, right, BINS), abs=1e-4)


def test_two_meters_summed_equal_one_over_both(h: Hierarchy) -> None:
    one, other, both, summed = (LevelScores(h) for _ in range(4))
    first, second = maps(h, 0, 2, 5, 5), maps(h, 1, 2, 5, 5)
    one.update(*first)
    other.update(*second)
    both.update(*first)
    both.update(*second)
    for total, a, b in zip(summed.tensors(), one.tensors(), other.tensors(), strict=True):
        total.copy_(a + b)  # what all_reduce does
    assert summed.compute() == both.compute()
    assert other.compute() != both.compute()


def test_scores_are_plain_json(h: Hierarchy) -> None:
    meter = LevelScores(h)
    meter.update(*maps(h, 0, 2, 5, 5))
    scores = meter.compute()
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
