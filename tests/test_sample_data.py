import json

import numpy as np
import pytest
from PIL import Image

from tools.make_sample_data import CLASSES, Settings, draw_sample, make_data_set, sample_id
from utils.classes import read_classes
from utils.errors import UserError
from utils.ids import read_ids
from utils.images import read_labels, read_photo


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_layout_is_that_of_the_real_set(sample_data, tree):
    train, val = read_ids(sample_data / "train_id.txt"), read_ids(sample_data / "val_id.txt")
    assert (len(train), len(val), set(train) & set(val)) == (6, 4, set())
    for sample in train + val:
        labels = read_labels(sample_data / "gt_masks" / f"{sample}.png")
        assert read_photo(sample_data / "JPEGImages" / f"{sample}.jpg").size == labels.shape[::-1]
        assert min(labels.shape) == 64
    assert read_classes(sample_data / "classes.txt", tree.names) == {str(v): tree.names[v] for v in tree.leaves}


def test_every_part_is_drawn_and_no_label_is_mixed(sample_data):
    seen = {int(v) for path in (sample_data / "gt_masks").iterdir() for v in np.unique(read_labels(path))}
    assert seen == set(range(len(CLASSES)))


def test_a_photo_depends_on_seed_and_index_alone(tmp_path, sample_data):
    again = tmp_path / "again"
    make_data_set(Settings(train=2, val=3, size=64, seed=0), again)
    for index in range(5):
        for name in (f"JPEGImages/{sample_id(index)}.jpg", f"gt_masks/{sample_id(index)}.png"):
            assert (again / name).read_bytes() == (sample_data / name).read_bytes()
    other, _ = draw_sample(Settings(size=64, seed=1), 0)
    same, _ = draw_sample(Settings(size=64, seed=0), 0)
    assert np.asarray(other).tobytes() != np.asarray(same).tobytes()


def test_the_photo_shows_what_the_mask_says():
    """Colours change where labels change, far more than elsewhere."""
    inside, outside = [], []
    for index in range(8):
        photo, mask = (np.asarray(image, int) for image in draw_sample(Settings(size=96), index))
        edge = mask[:, 1:] != mask[:, :-1]
        step = np.abs(np.diff(photo, axis=1)).sum(2)
        inside.append(step[edge].mean())
        outside.append(step[~edge].mean())
    assert np.mean(inside) > 3 * np.mean(outside)


def test_a_set_is_kept_or_finished_and_other_settings_are_refused(tmp_path):
    out, settings = tmp_path / "set", Settings(train=1, val=1, size=32)
    assert make_data_set(settings, out)
    before = files_of(out)
    assert not make_data_set(settings, out)
    with pytest.raises(UserError, match=r"other settings.*--out"):
        make_data_set(Settings(train=1, val=1, size=32, seed=1), out)
    assert files_of(out) == before

    record = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(record | {"complete": False}))
    (out / "gt_masks" / f"{sample_id(1)}.png").unlink()
    assert make_data_set(settings, out)
    assert files_of(out) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    with pytest.raises(UserError, match="did not make"):
        make_data_set(Settings(train=1, val=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
