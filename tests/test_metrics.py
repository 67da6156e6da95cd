"""Decoding rules and scores, by hand; tests/test_properties.py holds them to loops."""

import json

import pytest
import torch

from tests.reference import tree_of
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy
from utils.metrics import LevelScores

VOID = 255
RULES = sorted(DECODERS)


# --- rules ---
def test_prob_sum_answers_a_body_part_where_background_is_nearly_certain(h: Hierarchy) -> None:
    """Background 0.99, all else 0.5: three times 0.5 beats 0.99, but seven coins have to fall for it."""
    logits = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    logits[0, 0] = torch.tensor(0.99, dtype=torch.float64).logit()
    answers = {rule: h.names[DECODERS[rule](logits, h).item()] for rule in RULES}
    assert answers["prob_sum"] != "background"
    assert {answers[rule] for rule in RULES if rule != "prob_sum"} == {"background"}


# --- scores ---
def scored(leaf: list[int], labels: list[int], h: Hierarchy) -> dict:
    meter = LevelScores(h)
    meter.update(torch.tensor([[leaf]]), torch.tensor([[labels]]))
    return meter.compute()


def test_scores_of_six_pixels_by_hand(h: Hierarchy) -> None:
    #         background  head as torso  torso  up_leg as head  head  void
    scores = scored([0, 2, 2, 4, 4, 1], [0, 4, 2, 5, 4, VOID], h)
    parts, halves, body = scores["levels"]
    assert parts["absent"] == (absent := ["low_hand", "low_leg", "up_hand"])
    seen = {"background": 1.0, "torso": 1 / 2, "head": 1 / 3, "up_leg": 0.0}
    assert parts["IoU"] == seen | dict.fromkeys(absent)
    assert scores["mIoU1"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert scores["mIoU1_with_background"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)
    assert halves["IoU"] == {"background": 1.0, "upper_body": 3 / 4, "lower_body": 0.0}
    assert scores["mIoU2"] == pytest.approx(3 / 8)
    assert body["IoU"] == {"background": 1.0, "body": 1.0}
    assert [level["pixel_accuracy"] for level in scores["levels"]] == [3 / 5, 4 / 5, 1.0]
    assert scores["pixel_accuracy"] == 3 / 5
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


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
    plants = LevelScores(tree_of([None, None], ["soil", "leaf"], background=[0])).compute()
    assert [key for key in plants if key[:4] == "ECE_"] == ["ECE_leaf", "ECE_soil", "ECE_root leaf"]
