"""Decoding rules, by hand and against the loops."""

from itertools import product

import pytest
import torch

from tests import reference
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy

RULES = sorted(DECODERS)


def test_prob_sum_answers_a_body_part_where_background_is_nearly_certain(h: Hierarchy) -> None:
    """Background 0.99, all else 0.5: three times 0.5 beats 0.99, but seven coins have to fall for it."""
    logits = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    logits[0, 0] = torch.tensor(0.99, dtype=torch.float64).logit()
    answers = {rule: h.names[DECODERS[rule](logits, h).item()] for rule in RULES}
    assert answers["prob_sum"] != "background"
    assert {answers[rule] for rule in RULES if rule != "prob_sum"} == {"background"}


def test_mass_answers_body_where_its_parts_share_most_of_the_softmax(h: Hierarchy) -> None:
    """Background 0.4, each of six parts 0.1: the largest leaf is background, but 0.6 of the mass is body."""
    logits = torch.full((1, 10, 1, 1), 7.0, dtype=torch.float64)  # of inner nodes, which nobody trained
    logits[0, :7] = torch.tensor([0.4, *[0.1] * 6], dtype=torch.float64).log().view(7, 1, 1)
    logits[0, 4] += 0.01
    assert h.names[DECODERS["leaf"](logits, h).item()] == "background"
    assert h.names[DECODERS["mass"](logits, h).item()] == "head"


def test_logit_sum_is_the_most_probable_path_under_independent_nodes(h: Hierarchy) -> None:
    logits = torch.randn(1, h.num_nodes, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answer = DECODERS["logit_sum"](logits, h)
    for i, j in product(range(5), range(5)):
        s = logits[0, :, i, j].sigmoid()
        probability = {}
        for leaf in h.leaves:
            on_path = torch.tensor([v in h.paths[leaf] for v in range(h.num_nodes)])
            probability[leaf] = torch.where(on_path, s, 1 - s).prod().item()
        assert answer[0, i, j] == max(probability, key=probability.__getitem__)


def test_extreme_logits_have_an_answer(h: Hierarchy) -> None:
    """Scores saturate at 0 and 1; sums and minima of logits still tell leaves apart."""
    logits = torch.full((1, 10, 1, 1), -1e4)
    logits[0, [4, 7, 8]] = 1e4
    logits[0, 2] = 9e3
    for rule in ("logit_sum", "leaf", "tree_min"):
        assert DECODERS[rule](logits, h).item() == 4


def test_more_than_256_nodes_answer_in_int64() -> None:
    count = 300
    wide = reference.tree_of([None] * count)
    logits = torch.zeros(1, count, 1, 1)
    logits[0, 299] = 1
    answer = DECODERS["logit_sum"](logits, wide)
    assert answer.item() == 299
    assert answer.dtype == torch.int64


def test_shapes_that_do_not_fit_are_refused(h: Hierarchy) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        DECODERS["leaf"](torch.zeros(1, 7, 2, 2), h)
    with pytest.raises(ValueError, match="background, body"):
        DECODERS["leaf"](torch.zeros(1, 10, 2, 2), h, [1.0])
