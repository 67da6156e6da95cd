"""Decoding rules, by hand and against the loops."""

from itertools import product
from pathlib import Path

import pytest
import torch

from tests import reference
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy

TREES = Path(__file__).resolve().parents[1] / "configs" / "hierarchies"
RULES = sorted(DECODERS)


@pytest.fixture(scope="module")
def h() -> Hierarchy:
    return Hierarchy.load(TREES / "pascal_part.json")


def random_logits(h: Hierarchy, *shape: int, seed: int = 0) -> torch.Tensor:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, h.num_nodes, height, width, generator=generator, dtype=torch.float64) * 2


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
    logits = random_logits(h, 1, 5, 5)
    answer = DECODERS["logit_sum"](logits, h)
    for i, j in product(range(5), range(5)):
        s = logits[0, :, i, j].sigmoid()
        probability = {}
        for leaf in h.leaves:
            on_path = torch.tensor([v in h.paths[leaf] for v in range(h.num_nodes)])
            probability[leaf] = torch.where(on_path, s, 1 - s).prod().item()
        assert answer[0, i, j] == max(probability, key=probability.__getitem__)


@pytest.mark.parametrize("rule", RULES)
def test_memory_layout_does_not_matter(rule: str, h: Hierarchy) -> None:
    logits = random_logits(h, 3, 4, 5)
    before = logits.clone()
    expected = DECODERS[rule](logits, h)
    for layout in (
        logits.contiguous(memory_format=torch.channels_last),
        torch.nn.functional.pad(logits, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    ):
        assert torch.equal(DECODERS[rule](layout, h), expected)
    assert torch.equal(logits, before), "decoding must not write into the logits"


@pytest.mark.parametrize("rule", RULES)
def test_an_answer_is_a_leaf_and_its_levels_agree(rule: str) -> None:
    h = Hierarchy.load(TREES / "synthetic_deep.json")
    leaf = DECODERS[rule](random_logits(h, 2, 20, 20), h)
    assert leaf.dtype == torch.uint8
    assert set(leaf.unique().tolist()) <= set(h.leaves)
    levels = [h.level_of(leaf, level) for level in range(h.num_levels)]
    for fine, coarse, level in zip(levels, levels[1:], range(1, h.num_levels), strict=False):
        assert torch.equal(h.level_of(fine, level), coarse)


@pytest.mark.parametrize("rule", RULES)
def test_a_large_root_bias_decides_for_that_root(rule: str, h: Hierarchy) -> None:
    logits = random_logits(h, 1, 6, 6)
    assert (DECODERS[rule](logits, h, [1e4, 0.0]) == 0).all()
    assert (DECODERS[rule](logits, h, torch.tensor([0.0, 1e4])) != 0).all()
    assert torch.equal(DECODERS[rule](logits, h, [0.0, 0.0]), DECODERS[rule](logits, h))


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
