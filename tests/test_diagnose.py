"""What serves the pages: diagnosis by hand values on the worked pixel, and label maps of few leaves."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from docs.figures import fewer_labels
from docs.figures.diagnose import Diagnosis
from utils.encoding import load_encoding
from utils.hierarchy import Hierarchy
from utils.ids import read_ids
from utils.images import read_labels
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


def test_of_a_few_train_photos_the_leaves_stay_and_of_all_others_the_halves(
    tmp_path: Path, sample_data: Path, tree: Hierarchy, monkeypatch
) -> None:
    out = tmp_path / "fewer"
    options = ["--every", "4", "--out", str(out), f"root_data_dir={sample_data}"]
    monkeypatch.setattr("sys.argv", ["fewer_labels.py", *options])
    fewer_labels.main()
    train, val = (read_ids(sample_data / f"{split}_id.txt") for split in ("train", "val"))
    few = read_ids(out / "train_few.txt")
    assert few == train[::4]
    assert set(load_encoding(out / "labels", tree).files) == {*train, *val}
    for sample_id in (*train, *val):
        before, after = (
            read_labels(folder / f"{sample_id}.png") for folder in (sample_data / "gt_masks_hie", out / "labels")
        )
        keeps = sample_id in few or sample_id in val
        assert (after == (before if keeps else tree.level_of(before, 1))).all()
        assert keeps or not np.isin(after, tree.leaves[1:]).any()
