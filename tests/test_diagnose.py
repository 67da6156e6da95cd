"""Diagnosis: hand values on the worked pixel."""

import math

import pytest
import torch
from torch import Tensor

from docs.figures.diagnose import Diagnosis
from utils.hierarchy import Hierarchy
from utils.losses import build_criterion

HEAD, VOID = 4, 255


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def head_pixels(tree: Hierarchy) -> tuple[Tensor, Tensor]:
    """Two head pixels and a void one, with logits head 2, upper_body 1, body -1 and all others -3."""
    logits = torch.full((1, 10, 1, 3), -3.0)
    logits[0, tree.paths[HEAD], 0] = torch.tensor([-1.0, 1.0, 2.0]).unsqueeze(1)
    return logits, torch.tensor([[[HEAD, HEAD, VOID]]])


def diagnose(tree: Hierarchy) -> dict:
    names = ("bce", "tree_min")
    diagnosis = Diagnosis(tree, {name: build_criterion(name, tree) for name in names})
    for _ in range(2):  # sums over batches
        diagnosis.update(*head_pixels(tree))
    return diagnosis.summary()


def test_tree_min_tells_leaf_and_upper_body_nothing_where_bce_does(tree: Hierarchy) -> None:
    gradients = diagnose(tree)["gradients"]
    positive = {name: [gradients[name][tree.names[v]]["positive"] for v in tree.paths[HEAD]] for name in gradients}
    assert [node["share"] for node in positive["bce"]] == [1, 1, 1]
    assert [node["share"] for node in positive["tree_min"]] == [1, 0, 0]
    assert {node["pixels"] for node in positive["bce"]} == {4}
    sizes = [node["mean_size"] for node in positive["bce"]]
    assert sizes == pytest.approx([1 - sigmoid(-1), 1 - sigmoid(1), 1 - sigmoid(2)])
    assert positive["tree_min"][0]["mean_size"] == pytest.approx(3 * (1 - sigmoid(-1)))
