"""The preparation tool: each kind of source gives the right labels, and what is wrong is told by id."""

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
# id in the standard order -> id in our tree, void unchanged; written out by hand on purpose
STANDARD_TO_TREE = {0: 0, 1: 4, 2: 2, 3: 6, 4: 1, 5: 5, 6: 3, 255: 255}
OFFICIAL_TRAIN, OFFICIAL_VAL = "2008_000008", "2008_000003"
STANDARD_CLASSES = "0: background\n1: head\n2: torso\n3: upper arm\n4: Lower Arms\n5: upper-leg\n6: lower_leg\n"


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
    """Three photos with masks in the standard order."""
    return masks(tmp_path / "own", dict.fromkeys("abc", every_label(255)), STANDARD_CLASSES)


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


def masks(root: Path, labels: dict[str, np.ndarray], classes: str | None, suffix: str = ".png") -> Path:
    (root / "gt_masks").mkdir(parents=True)
    for sample_id, label_map in labels.items():
        photo(root / "JPEGImages", sample_id)
        path = root / "gt_masks" / f"{sample_id}{suffix}"
        np.save(path, label_map) if suffix == ".npy" else Image.fromarray(label_map).save(path)
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def every_label(*extra: int) -> np.ndarray:
    return np.resize(np.array([0, 1, 2, 3, 4, 5, 6, *extra], np.uint8), (HEIGHT, WIDTH))


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


# ---- masks in the standard order, and in the project's own layout ------------------------------------------


@pytest.mark.parametrize("how", ["option", "classes.txt"])
def test_standard_order_masks_reach_the_right_classes_and_keep_void(own, run, out, how):
    if how == "option":
        (own / "classes.txt").unlink()
        with pytest.raises(UserError, match=r"nothing says .* --order standard"):
            run(own)
    assert run(own, *(["--order", "standard"] if how == "option" else [])) == 0
    assert np.array_equal(label_map(out, "a"), np.vectorize(STANDARD_TO_TREE.get)(every_label(255)))
    void = next(row for row in record_of(out)["classes"] if row["name"] == "void")
    assert void["train_pixels"] == 2 * (every_label(255) == 255).sum()


def test_an_order_that_contradicts_classes_txt_is_refused(own, run):
    with pytest.raises(UserError, match=r"--order project means .*classes\.txt says"):
        run(own, "--order", "project")


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_project_masks_are_matched_by_name_whatever_their_numbers(tmp_path, run, out, suffix):
    labels = np.resize(np.array([0, 3, 9, 255], np.uint8), (HEIGHT, WIDTH))
    assert run(masks(tmp_path / "own", {"a": labels, "b": labels}, "0: bg\n3: up_leg\n9: head", suffix)) == 0
    assert np.array_equal(label_map(out, "b"), np.vectorize({0: 0, 3: 5, 9: 4, 255: 255}.get)(labels))
    assert (out / "classes.txt").read_text().startswith("0: background\n1: low_hand\n2: torso\n")


def test_labels_that_the_class_list_lacks_and_double_masks_are_told_by_id(own, run, out):
    Image.fromarray(every_label(77)).save(own / "gt_masks" / "c.png")
    np.save(own / "gt_masks" / "a.npy", every_label())
    Image.fromarray(every_label()).save(own / "gt_masks" / "no photo.png")
    photo(own / "JPEGImages", "d")
    Image.fromarray(every_label()).save(own / "gt_masks" / "d.png")
    assert run(own) == 1
    problems = record_of(out)["problems"]
    assert sorted(problems) == ["a", "c", "no photo"]
    assert "77" in problems["c"]


# ---- finding, splitting, writing ---------------------------------------------------------------------------


def test_folders_given_one_by_one_need_no_source(tmp_path, run, out):
    for sample_id in ("a", "b"):
        person(sample_id, tmp_path)
    (tmp_path / "Annotations_Part").rename(tmp_path / "x")
    (tmp_path / "JPEGImages").rename(tmp_path / "y")
    assert run("--annotations", tmp_path / "x", "--photos", tmp_path / "y") == 0
    assert (label_map(out, "a") == box(2, 6) * 2).all()


def test_two_possible_sources_are_named_and_masks_that_nothing_explains_are_none(own, run, out):
    for sample_id in ("c", "d"):
        person(sample_id, own)
    with pytest.raises(UserError, match=r"Annotations_Part.*gt_masks; choose by --annotations"):
        run(own)
    (own / "classes.txt").unlink()
    assert run(own) == 0
    assert sorted(p.stem for p in (out / "gt_masks").iterdir()) == ["c", "d"]


@pytest.mark.parametrize("missing", ["JPEGImages", "Annotations_Part"])
def test_a_missing_folder_is_named(tmp_path, run, missing):
    person("a", tmp_path / "raw")
    (tmp_path / "raw" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=missing):
        run(tmp_path / "raw")


def test_lists_beside_the_masks_are_kept(own, run, out):
    (own / "train_id.txt").write_text("b\n")
    (own / "val_id.txt").write_text("c\na\n")
    assert run(own) == 0
    assert read_ids(out / "val_id.txt") == ["c", "a"]


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
    Image.fromarray(np.full((HEIGHT, WIDTH), 1, np.uint8)).save(own / "gt_masks" / "c.png")
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
    assert (own / "gt_masks" / "a.png").is_file()
    for _ in range(2):
        assert run(own, "--out", own / "prepared") == 0


@pytest.mark.parametrize("copy", [False, True])
def test_photos_are_linked_or_copied(own, run, out, copy):
    assert run(own, *(["--copy"] if copy else [])) == 0
    made, origin = out / "JPEGImages" / "a.jpg", own / "JPEGImages" / "a.jpg"
    assert made.read_bytes() == origin.read_bytes()
    assert made.samefile(origin) is not copy


def test_no_usable_photo_at_all_is_an_error_that_lists_them(own, run, capsys):
    (own / "classes.txt").write_text("0: bg\n1: head\n")
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
    photo(own / "JPEGImages", "d")
    Image.fromarray(every_label()).save(own / "gt_masks" / "d.png")
    assert run(own, "--copy") == 0
    assert run("--check", out) == 0
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.width > 1000
    assert "at fault: none" in capsys.readouterr().out

    (out / "JPEGImages" / "a.jpg").unlink()
    (out / "gt_masks" / "b.png").write_bytes(b"no picture")
    photo(out / "JPEGImages", "c", (4, 4))
    Image.fromarray(every_label(44)).save(out / "gt_masks" / "d.png")
    photo(out / "JPEGImages", "stranger")
    (out / "classes.txt").write_text(STANDARD_CLASSES)
    (out / "val_id.txt").write_text("a\nghost\n")
    (out / "train_id.txt").write_text("a\nb\nc\nd\n")
    assert run("--check", out) == 1
    told = capsys.readouterr().out
    for words in ("a", "b", "c", "d", "ghost"):
        assert f"  {words}: " in told
    for words in ("label 44 at row", "not in the tree's order", "in both train and val: a", "that of stranger"):
        assert words in told
    with pytest.raises(UserError, match="does not exist"):
        run("--check", out / "nothing")
