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
from utils.pascal_part import CLASS_OF_PART

WIDTH, HEIGHT = 12, 9
OFFICIAL_TRAIN, OFFICIAL_VAL = "2008_000008", "2008_000003"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the tool; what it prepares goes to tmp_path/out where nothing else is said."""

    def tool_with(*arguments) -> int:
        words = [*map(str, arguments)]
        words += [] if {"--out", "--check"} & {*words} else ["--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["prepare_pascal_part.py", *words])
        return tool.main()

    return tool_with


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def own(tmp_path) -> Path:
    """Three annotated photos, none of them in the official lists."""
    for sample_id in "abc":
        person(sample_id, tmp_path / "own")
    return tmp_path / "own"


def photo(folder: Path, sample_id: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(folder / f"{sample_id}.jpg")


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


def record_of(out: Path) -> dict:
    return json.loads((out / "dataset.json").read_text())


def label_map(out: Path, sample_id: str) -> np.ndarray:
    return read_labels(out / "gt_masks" / f"{sample_id}.png")


# ---- raw annotations ---------------------------------------------------------------------------------------


def test_later_parts_paint_over_earlier_ones_and_other_objects_paint_background(tmp_path, run, out):
    annotations, photos = tmp_path / "raw" / "Annotations_Part", tmp_path / "raw" / "VOCdevkit" / "JPEGImages"
    first = thing("person", ("torso", box(0, 8)), ("luarm", box(6, 10)), ("neck", box(0, 1)))
    annotation(annotations, OFFICIAL_TRAIN, first, thing("chair"), thing("dog", ("head", box(3, 5))))
    annotation(annotations, OFFICIAL_VAL, thing("person", ("rfoot", box(0, 2)), ("rhand", box(1, 3))))
    for sample_id in (OFFICIAL_TRAIN, OFFICIAL_VAL):
        photo(photos, sample_id)
    assert run(tmp_path / "raw") == 0
    assert (label_map(out, OFFICIAL_TRAIN) == np.tile([4, 2, 2, 0, 0, 2, 6, 6, 6, 6, 0, 0], (HEIGHT, 1))).all()
    assert (label_map(out, OFFICIAL_VAL) == [3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]).all()
    assert read_ids(out / "train_id.txt") == [OFFICIAL_TRAIN]
    assert read_ids(out / "val_id.txt") == [OFFICIAL_VAL]
    assert record_of(out)["split"]["kind"] == "official"


def test_photos_without_people_are_left_out_and_counted(tmp_path, run, out):
    root, head = tmp_path / "raw", ("head", box(0, 3))
    for sample_id in ("a", "b"):
        person(sample_id, root)
    annotation(root / "Annotations_Part", "dogs", thing("dog", head))
    annotation(root / "Annotations_Part", "covered", thing("person", head), thing("cat", ("ear", box(0, 3))))
    annotation(root / "Annotations_Part", "no_parts", thing("person"))
    assert run(root) == 0
    assert record_of(out)["left_out"] == {"no person": 1, "a person, but no visible part": 2}
    assert sorted(p.stem for p in (out / "JPEGImages").iterdir()) == ["a", "b"]


def test_every_fault_is_told_by_id_and_the_rest_is_done(tmp_path, run, out, capsys):
    from scipy.io import savemat

    root = tmp_path / "raw"
    annotations = root / "Annotations_Part"
    for sample_id in ("good1", "good2", "small_photo", "no_photo", "broken_photo"):
        person(sample_id, root)
    photo(root / "JPEGImages", "small_photo", (5, 5))
    (root / "JPEGImages" / "no_photo.jpg").unlink()
    broken = root / "JPEGImages" / "broken_photo.jpg"
    broken.write_bytes(broken.read_bytes()[:-60])
    annotation(annotations, "odd_part", thing("person", ("rwing", box(0, 2))))
    annotation(annotations, "two_sizes", thing("person", ("head", box(0, 2)), ("nose", box(0, 2, (4, 4)))))
    savemat(annotations / "no_anno.mat", {"something": 1})
    savemat(annotations / "no_objects.mat", {"anno": {"imname": "x"}})
    savemat(annotations / "no_struct.mat", {"anno": 3.0})
    savemat(annotations / "numbers.mat", {"anno": {"objects": np.arange(3.0)}})
    (annotations / "cut_off.mat").write_bytes((annotations / "good1.mat").read_bytes()[:-40])
    (annotations / "empty.mat").write_bytes(b"")

    assert run(root) == 1
    problems = record_of(out)["problems"]
    faulty = "broken_photo cut_off empty no_anno no_objects no_photo no_struct numbers odd_part small_photo two_sizes"
    assert sorted(problems) == faulty.split()
    for sample_id, words in (("odd_part", "'rwing'"), ("small_photo", "5x5"), ("no_anno", "'anno'")):
        assert words in problems[sample_id]
    told = capsys.readouterr().out
    assert all(f"  {sample_id}: " in told for sample_id in problems)
    assert sorted(read_ids(out / "train_id.txt") + read_ids(out / "val_id.txt")) == ["good1", "good2"]


def test_missing_scipy_is_said_with_the_command_that_installs_it(tmp_path, run, out, monkeypatch):
    person("a", tmp_path / "raw")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-tools\.txt"):
        run(tmp_path / "raw")
    assert not out.exists()


def test_the_part_table_covers_all_24_person_parts():
    sides = [side + part for side in "lr" for part in "eye ear ebrow uarm larm hand uleg lleg foot".split()]
    assert sorted(CLASS_OF_PART) == sorted(["head", "nose", "mouth", "hair", "neck", "torso", *sides])


def test_real_annotations_equal_the_released_masks_in_every_pixel(pascal_part_raw, run, out):
    assert run(pascal_part_raw, "--copy") == 0  # a link would touch data that is not ours
    released = {path.stem: np.load(path) for path in (pascal_part_raw / "gt_masks").glob("*.npy")}
    assert released.keys() == {path.stem for path in (out / "gt_masks").iterdir()}
    for sample_id, labels in released.items():
        assert np.array_equal(label_map(out, sample_id), labels), sample_id


# ---- finding, splitting, writing ---------------------------------------------------------------------------


def test_folders_given_one_by_one_need_no_source(tmp_path, own, run, out):
    (own / "Annotations_Part").rename(tmp_path / "x")
    (own / "JPEGImages").rename(tmp_path / "y")
    assert run("--annotations", tmp_path / "x", "--photos", tmp_path / "y") == 0
    assert (label_map(out, "a") == box(2, 6) * 2).all()


def test_a_missing_a_doubled_and_an_empty_folder_are_named(own, run):
    (own / "copy" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(UserError, match=r"several folders .*JPEGImages.*; choose by --photos"):
        run(own)
    (own / "copy" / "JPEGImages").rename(own / "copy" / "Annotations_Part")
    with pytest.raises(UserError, match=r"several folders .*; choose by --annotations"):
        run(own)
    with pytest.raises(UserError, match=r"holds no \.mat file.*dataset_hie_enc"):
        run(own, "--annotations", own / "copy" / "Annotations_Part")
    with pytest.raises(UserError, match="no folder named JPEGImages"):
        run(own / "Annotations_Part")


def test_a_share_of_val_draws_a_split_in_place_of_the_official_one(tmp_path, run, out):
    for sample_id in (OFFICIAL_TRAIN, OFFICIAL_VAL, "a", "b"):
        person(sample_id, tmp_path / "raw")
    assert run(tmp_path / "raw", "--val-share", 0.75) == 0
    assert len(read_ids(out / "val_id.txt")) == 3
    assert run(tmp_path / "raw", "--overwrite") == 0
    assert read_ids(out / "val_id.txt") == [OFFICIAL_VAL]
    assert record_of(out)["left_out"] == {"not in the split": 2}


def test_the_official_lists_are_complete_and_disjoint():
    train, val = (read_ids(tool.OFFICIAL[name]) for name in ("train", "val"))
    assert (len(train), len(val), len({*train, *val})) == (1716, 1817, 3533)


def test_a_users_folder_is_refused_and_set_aside_only_when_told(own, run, out):
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run(own)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert run(own, "--overwrite") == 0
    assert [path.read_text() for path in out.parent.glob("out.old-*/thesis.txt")] == ["mine"]
    assert not (out / "thesis.txt").exists()


def test_a_second_run_completes_the_folder_and_redoes_what_changed(own, run, out):
    assert run(own) == 0
    kept = (out / "gt_masks" / "a.png").stat().st_mtime_ns
    (out / "gt_masks" / "b.png").unlink()
    annotation(own / "Annotations_Part", "c", thing("person", ("head", box(0, WIDTH))))
    assert run(own) == 0
    assert (out / "gt_masks" / "a.png").stat().st_mtime_ns == kept
    assert (label_map(out, "c") == 4).all()
    assert (out / "gt_masks" / "b.png").is_file()
    with pytest.raises(UserError, match="seed was 0, is 5"):
        run(own, "--seed", 5)
    assert not list(out.rglob("*.part"))


def test_the_source_is_never_the_output_nor_the_output_the_source(own, run):
    with pytest.raises(UserError, match="holds the source"):
        run(own, "--out", own, "--overwrite")
    assert (own / "JPEGImages" / "a.jpg").is_file()
    for _ in range(2):
        assert run(own, "--out", own / "prepared") == 0


@pytest.mark.parametrize("copy", [False, True])
def test_photos_are_linked_or_copied(own, run, out, copy):
    assert run(own, *(["--copy"] if copy else [])) == 0
    made, origin = out / "JPEGImages" / "a.jpg", own / "JPEGImages" / "a.jpg"
    assert made.read_bytes() == origin.read_bytes()
    assert made.samefile(origin) is not copy


def test_no_usable_photo_at_all_is_an_error_that_lists_them(own, run, capsys):
    for path in (own / "JPEGImages").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no photo of 3"):
        run(own)
    assert "  a: " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["src --out o --val-share 1.5", "src --check o", "src --out o --cop"])
def test_options_that_make_no_sense_end_with_status_2(run, arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments.split())
    assert end.value.code == 2


# ---- --check -----------------------------------------------------------------------------------------------


def test_check_passes_a_prepared_folder_and_finds_each_kind_of_damage(own, run, out, capsys):
    person("d", own)
    assert run(own, "--copy") == 0
    assert run("--check", out) == 0
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.width > 1000
    assert "at fault: none" in capsys.readouterr().out

    (out / "JPEGImages" / "a.jpg").unlink()
    (out / "gt_masks" / "b.png").write_bytes(b"no picture")
    photo(out / "JPEGImages", "c", (4, 4))
    Image.fromarray(box(0, 3) * 44).save(out / "gt_masks" / "d.png")
    photo(out / "JPEGImages", "stranger")
    (out / "val_id.txt").write_text("a\nghost\n")
    (out / "train_id.txt").write_text("a\nb\nc\nd\n")
    (out / "dataset.json").write_text(json.dumps(record_of(out) | {"complete": False}))
    assert run("--check", out) == 1
    told = capsys.readouterr().out
    for words in ("a", "b", "c", "d", "ghost"):
        assert f"  {words}: " in told
    for words in ("label 44 at row", "did not finish", "in both train and val: a", "that of stranger"):
        assert words in told
    with pytest.raises(UserError, match="does not exist"):
        run("--check", out / "nothing")
