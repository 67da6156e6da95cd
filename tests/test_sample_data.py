import numpy as np
import pytest

from tools.make_sample_data import CLASSES, Settings, draw_sample, make_data_set
from utils.errors import UserError
from utils.ids import read_ids
from utils.images import read_labels, read_photo
from utils.masks import read_classes


def test_the_layout_is_that_of_the_real_set(sample_data, tree):
    train, val = read_ids(sample_data / "train_id.txt"), read_ids(sample_data / "val_id.txt")
    assert (len(train), len(val), set(train) & set(val)) == (6, 4, set())
    for sample in train + val:
        labels = read_labels(sample_data / "gt_masks" / f"{sample}.png")
        assert read_photo(sample_data / "JPEGImages" / f"{sample}.jpg").size == labels.shape[::-1]
        assert min(labels.shape) == 64
    seen = {int(v) for path in (sample_data / "gt_masks").iterdir() for v in np.unique(read_labels(path))}
    assert seen == set(range(len(CLASSES))), "every part is drawn, and no label is mixed"
    assert read_classes(sample_data / "classes.txt", tree.names) == {str(v): tree.names[v] for v in tree.leaves}


def test_a_photo_depends_on_seed_and_index_alone(tmp_path, sample_data):
    again = tmp_path / "again"
    make_data_set(Settings(train=2, val=3, size=64, seed=0), again)
    for name in ("JPEGImages", "gt_masks"):
        for path in (again / name).iterdir():
            assert path.read_bytes() == (sample_data / name / path.name).read_bytes()
    assert draw_sample(Settings(size=64, seed=1), 0)[0] != draw_sample(Settings(size=64, seed=0), 0)[0]


def test_a_set_is_kept_and_anything_else_is_left_alone(tmp_path):
    out, settings = tmp_path / "set", Settings(train=1, val=1, size=32)
    (tmp_path / ".set.part" / "gt_masks").mkdir(parents=True)  # of a killed run
    make_data_set(settings, out)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    make_data_set(settings, out)
    with pytest.raises(UserError, match=r"not empty; .*--out"):
        make_data_set(Settings(train=1, val=1, size=32, seed=1), out)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
