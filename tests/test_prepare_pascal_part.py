"""The preparation tool: raw annotations give the right labels, and what is wrong is told by id."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import prepare_pascal_part as tool
from utils.errors import UserError
from utils.ids import read_ids
from utils.images import read_labels

WIDTH, HEIGHT = 12, 9
OFFICIAL_TRAIN, OFFICIAL_VAL = "2008_000008", "2008_000003"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(out, monkeypatch):
    def tool_with(source: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare_pascal_part.py", str(source), "--out", str(out)])
        return tool.main()

    return tool_with


def photo(folder: Path, sample_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30)).save(folder / f"{sample_id}.jpg")


def box(x0: int, x1: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[:, x0:x1] = 1
    return mask


def structs(fields: list[str], rows: list[tuple]) -> np.ndarray:
    """A MATLAB struct array, as the real annotations hold."""
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for column, row in enumerate(rows):
        array[0, column] = row
    return array


def thing(kind: str, *parts: tuple[str, np.ndarray]) -> tuple:
    part_array = structs(["part_name", "mask"], list(parts)) if parts else np.empty((0, 0))
    return (kind, 15, np.ones((HEIGHT, WIDTH), np.uint8), part_array)


def annotation(folder: Path, sample_id: str, *things: tuple) -> None:
    savemat = pytest.importorskip("scipy.io", reason="scipy reads the raw annotations").savemat
    folder.mkdir(parents=True, exist_ok=True)
    objects = structs(["class", "class_ind", "mask", "parts"], list(things))
    savemat(folder / f"{sample_id}.mat", {"anno": {"imname": sample_id, "objects": objects}}, do_compression=True)


def person(sample_id: str, root: Path) -> None:
    annotation(root / "Annotations_Part", sample_id, thing("person", ("torso", box(2, 6))))
    photo(root / "JPEGImages", sample_id)


def label_map(out: Path, sample_id: str) -> np.ndarray:
    return read_labels(out / "gt_masks" / f"{sample_id}.png")


def test_later_parts_paint_over_earlier_ones_and_other_objects_paint_background(tmp_path, run, out):
    annotations, photos = tmp_path / "raw" / "Annotations_Part", tmp_path / "raw" / "VOCdevkit" / "JPEGImages"
    first = thing("person", ("torso", box(0, 8)), ("luarm", box(6, 10)), ("neck", box(0, 1)))
    annotation(annotations, OFFICIAL_TRAIN, first, thing("chair"), thing("dog", ("head", box(3, 5))))
    annotation(annotations, OFFICIAL_VAL, thing("person", ("rfoot", box(0, 2)), ("rhand", box(1, 3))))
    annotation(annotations, "elsewhere", first)
    for sample_id in (OFFICIAL_TRAIN, OFFICIAL_VAL, "elsewhere"):
        photo(photos, sample_id)
    assert run(tmp_path / "raw") == 0
    assert (label_map(out, OFFICIAL_TRAIN) == np.tile([4, 2, 2, 0, 0, 2, 6, 6, 6, 6, 0, 0], (HEIGHT, 1))).all()
    assert (label_map(out, OFFICIAL_VAL) == [3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]).all()
    assert [read_ids(out / f"{name}_id.txt") for name in ("train", "val")] == [[OFFICIAL_TRAIN], [OFFICIAL_VAL]]
    assert json.loads((out / "dataset.json").read_text())["split"] == {"train": 1, "val": 1}
    photo_made, origin = (folder / f"{OFFICIAL_VAL}.jpg" for folder in (out / "JPEGImages", photos))
    assert photo_made.read_bytes() == origin.read_bytes()


def test_every_fault_is_told_by_id_and_the_rest_is_done(tmp_path, run, out, capsys):
    from scipy.io import savemat

    root, head = tmp_path / "raw", ("head", box(0, 3))
    annotations = root / "Annotations_Part"
    for sample_id in ("good", "no_photo", "broken_photo"):
        person(sample_id, root)
    (root / "JPEGImages" / "no_photo.jpg").unlink()
    broken = root / "JPEGImages" / "broken_photo.jpg"
    broken.write_bytes(broken.read_bytes()[:-60])
    annotation(annotations, "dogs", thing("dog", head))
    annotation(annotations, "covered", thing("person", head), thing("cat", ("ear", box(0, 3))))
    annotation(annotations, "odd_part", thing("person", ("rwing", box(0, 2))))
    annotation(annotations, "two_sizes", thing("person", head, ("nose", box(0, 2, (4, 5)))))
    for sample_id in ("covered", "odd_part", "two_sizes"):
        photo(root / "JPEGImages", sample_id)
    savemat(annotations / "no_anno.mat", {"something": 1})
    (annotations / "cut_off.mat").write_bytes((annotations / "good.mat").read_bytes()[:-40])

    assert run(root) == 1
    record = json.loads((out / "dataset.json").read_text())
    assert sorted(record["problems"]) == "broken_photo cut_off no_anno no_photo odd_part two_sizes".split()
    words = {"odd_part": "'rwing'", "two_sizes": "'nose' is 5x4, the photo 12x9", "no_anno": "'anno'"}
    assert all(words[sample_id] in record["problems"][sample_id] for sample_id in words)
    assert record["left_out"] == {"no person": 1, "a person, but no visible part": 1}
    told = capsys.readouterr().out
    assert all(f"at fault: {sample_id}: " in told for sample_id in record["problems"])
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert made == ["JPEGImages/good.jpg", "classes.txt", "dataset.json", "gt_masks/good.png"], "in no official list"


def test_real_annotations_equal_the_released_masks_in_every_pixel(pascal_part_raw, run, out):
    assert run(pascal_part_raw) == 0
    released = {path.stem: np.load(path) for path in (pascal_part_raw / "gt_masks").glob("*.npy")}
    assert released.keys() == {path.stem for path in (out / "gt_masks").iterdir()}
    for sample_id, labels in released.items():
        assert np.array_equal(label_map(out, sample_id), labels), sample_id


def test_what_cannot_be_prepared_is_refused_and_nothing_is_left_or_lost(tmp_path, run, out, monkeypatch):
    own = tmp_path / "own"
    person("a", own)
    (own / "copy" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(UserError, match=r"one folder JPEGImages .*own/JPEGImages"):
        run(own)
    (own / "copy" / "JPEGImages").rmdir()
    with pytest.raises(UserError, match=r"one folder Annotations_Part .* found none.*docs/data\.md"):
        run(own / "copy")
    (own / "JPEGImages" / "a.jpg").rename(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"none of the 1 annotations (.|\n)*  a: no file for id"):
        run(own)
    assert not list(tmp_path.glob("*out*"))
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-tools\.txt"):
        run(own)
