"""The model in the clone: it loads, and it scores what its card says."""

import re
from pathlib import Path

import pytest

from configs.config import load_config
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from manage.predictor import SHIPPED, Predictor
from utils.encoder import Encoder
from utils.hierarchy import Hierarchy
from utils.ids import read_ids, write_ids

FIRST = 100
SCORES = ("mIoU1", "mIoU2", "mIoU3", "pixel_accuracy")


def test_it_is_small_and_knows_its_tree(tree: Hierarchy) -> None:
    assert SHIPPED.stat().st_size < 10e6
    assert Predictor.load().hierarchy.to_dict() == tree.to_dict()


@pytest.fixture
def first_photos(pascal_part_root: Path, tmp_path: Path, tree: Hierarchy) -> Path:
    """A data set of the first val photos, as files of their own, and one train photo."""
    lists = {"train": read_ids(pascal_part_root / "train_id.txt")[:1]}
    lists["val"] = read_ids(pascal_part_root / "val_id.txt")[:FIRST]
    for folder, ending in (("JPEGImages", ".jpg"), ("gt_masks", ".png")):
        (tmp_path / folder).mkdir()
        for name in (name for ids in lists.values() for name in ids):
            (tmp_path / folder / f"{name}{ending}").symlink_to(pascal_part_root / folder / f"{name}{ending}")
    for split, ids in lists.items():
        write_ids(ids, tmp_path / f"{split}_id.txt")
    Encoder(tmp_path / "gt_masks", tmp_path / "JPEGImages", tmp_path / "gt_masks_hie", tree).run()
    return tmp_path


@pytest.mark.slow
def test_it_scores_what_its_card_says(first_photos: Path) -> None:
    config = load_config(None, [f"root_dir={first_photos}", f"root_data_dir={first_photos}"])
    record = EvaluationManager(config, EvaluationOptions(checkpoint=str(SHIPPED), pictures=False)).run()
    card = SHIPPED.with_name("README.md").read_text()
    said = re.search(rf"first {FIRST} val photos: ([\d.]+) / ([\d.]+) / ([\d.]+) at ([\d.]+) %", card)
    assert said is not None
    assert [f"{100 * record['scores'][name]:.2f}" for name in SCORES] == list(said.groups())
