"""The preparation tool: each kind of source gives the right labels, and what is wrong is told by id."""

import json
import os
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


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_pascal_part.py", *map(str, arguments)])
    return tool.main()


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


# ---- raw annotations ---------------------------------------------------------------------------------------


def test_later_parts_paint_over_earlier_ones_and_other_objects_paint_background(tmp_path, monkeypatch):
    root = tmp_path / "downloads"
    annotation(
        root / "Annotations_Part",
        OFFICIAL_TRAIN,
        thing("person", ("torso", box(0, 8)), ("luarm", box(6, 10)), ("neck", box(0, 1))),
        thing("chair"),
        thing("dog", ("head", box(3, 5))),
    )
    photo(root / "VOCdevkit" / "VOC2010" / "JPEGImages", OFFICIAL_TRAIN)
    annotation(root / "Annotations_Part", OFFICIAL_VAL, thing("person", ("rfoot", box(0, 2)), ("rhand", box(1, 3))))
    photo(root / "VOCdevkit" / "VOC2010" / "JPEGImages", OFFICIAL_VAL)

    assert run(monkeypatch, root, "--out", tmp_path / "out") == 0
    first = read_labels(tmp_path / "out" / "gt_masks" / f"{OFFICIAL_TRAIN}.png")
    assert first.shape == (HEIGHT, WIDTH)
    assert (first == [4, 2, 2, 0, 0, 2, 6, 6, 6, 6, 0, 0]).all()
    second = read_labels(tmp_path / "out" / "gt_masks" / f"{OFFICIAL_VAL}.png")
    assert (second == [3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]).all()
    assert read_ids(tmp_path / "out" / "train_id.txt") == [OFFICIAL_TRAIN]
    assert read_ids(tmp_path / "out" / "val_id.txt") == [OFFICIAL_VAL]
    assert record_of(tmp_path / "out")["split"]["kind"] == "official"


def test_photos_without_people_are_left_out_and_counted(tmp_path, monkeypatch):
    root = tmp_path / "raw"
    for sample_id in ("a", "b"):
        person(sample_id, root)
    annotation(root / "Annotations_Part", "dogs", thing("dog", ("head", box(0, 3))))
    annotation(
        root / "Annotations_Part", "covered", thing("person", ("head", box(0, 3))), thing("cat", ("ear", box(0, 3)))
    )
    annotation(root / "Annotations_Part", "no_parts", thing("person"))

    assert run(monkeypatch, root, "--out", tmp_path / "out") == 0
    assert record_of(tmp_path / "out")["left_out"] == {"no person": 1, "a person, but no visible part": 2}
    assert sorted(p.stem for p in (tmp_path / "out" / "JPEGImages").iterdir()) == ["a", "b"]


def test_every_fault_is_told_by_id_and_the_rest_is_done(tmp_path, monkeypatch, capsys):
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
    savemat(annotations / "objects_are_numbers.mat", {"anno": {"objects": np.arange(3.0)}})
    (annotations / "cut_off.mat").write_bytes((annotations / "good1.mat").read_bytes()[:-40])
    (annotations / "empty.mat").write_bytes(b"")

    assert run(monkeypatch, root, "--out", tmp_path / "out") == 1
    problems = record_of(tmp_path / "out")["problems"]
    assert sorted(problems) == [
        "broken_photo", "cut_off", "empty", "no_anno", "no_objects", "no_photo", "no_struct", "objects_are_numbers",
        "odd_part", "small_photo", "two_sizes",
    ]  # fmt: skip
    assert "'rwing'" in problems["odd_part"]
    assert "5x5" in problems["small_photo"]
    assert "'anno'" in problems["no_anno"]
    told = capsys.readouterr().out
    assert all(f"  {sample_id}: " in told for sample_id in problems)
    done = read_ids(tmp_path / "out" / "train_id.txt") + read_ids(tmp_path / "out" / "val_id.txt")
    assert sorted(done) == ["good1", "good2"]


def test_missing_scipy_is_said_with_the_command_that_installs_it(tmp_path, monkeypatch):
    person("a", tmp_path / "raw")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-tools\.txt"):
        run(monkeypatch, tmp_path / "raw", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_part_table_covers_all_24_person_parts():
    sides = [
        side + part for side in "lr" for part in ("eye", "ear", "ebrow", "uarm", "larm", "hand", "uleg", "lleg", "foot")
    ]
    assert sorted(CLASS_OF_PART) == sorted(["head", "nose", "mouth", "hair", "neck", "torso", *sides])


def test_real_annotations_equal_the_released_masks_in_every_pixel(tmp_path, monkeypatch):
    if "PASCAL_PART_RAW" not in os.environ:
        pytest.skip("PASCAL_PART_RAW is not set: no real annotations")
    raw = Path(os.environ["PASCAL_PART_RAW"])
    # copies: a link would touch data that is not ours
    assert run(monkeypatch, raw, "--copy", "--out", tmp_path / "out") == 0
    released = sorted((raw / "gt_masks").glob("*.npy"))
    assert released
    for path in released:
        assert np.array_equal(read_labels(tmp_path / "out" / "gt_masks" / f"{path.stem}.png"), np.load(path)), path.stem
    made = {p.stem for p in (tmp_path / "out" / "gt_masks").iterdir()}
    assert made == {path.stem for path in released}


# ---- masks in the standard order, and in the project's own layout ------------------------------------------


@pytest.mark.parametrize("how", ["option", "classes.txt"])
def test_standard_order_masks_reach_the_right_classes_and_keep_void(tmp_path, monkeypatch, how):
    labels = every_label(255)
    root = masks(tmp_path / "pngs", {"a": labels, "b": labels}, STANDARD_CLASSES if how == "classes.txt" else None)
    option = ["--order", "standard"] if how == "option" else []
    assert run(monkeypatch, root, "--out", tmp_path / "out", *option) == 0
    expected = np.vectorize(STANDARD_TO_TREE.get)(labels)
    assert np.array_equal(read_labels(tmp_path / "out" / "gt_masks" / "a.png"), expected)
    void = next(row for row in record_of(tmp_path / "out")["classes"] if row["name"] == "void")
    assert void["train_pixels"] == (labels == 255).sum()


def test_an_order_that_nothing_states_is_refused_not_guessed(tmp_path, monkeypatch):
    root = masks(tmp_path / "pngs", {"a": every_label(), "b": every_label()}, None)
    with pytest.raises(UserError, match="--order standard"):
        run(monkeypatch, root, "--out", tmp_path / "out")


def test_an_order_that_contradicts_classes_txt_is_refused(tmp_path, monkeypatch):
    root = masks(tmp_path / "pngs", {"a": every_label(), "b": every_label()}, STANDARD_CLASSES)
    with pytest.raises(UserError, match=r"--order project means .*classes\.txt says"):
        run(monkeypatch, root, "--order", "project", "--out", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_project_masks_are_matched_by_name_whatever_their_numbers(tmp_path, monkeypatch, suffix):
    labels = np.resize(np.array([0, 3, 9, 255], np.uint8), (HEIGHT, WIDTH))
    root = masks(tmp_path / "own", {"a": labels, "b": labels}, "0: bg\n3: up_leg\n9: head", suffix)
    assert run(monkeypatch, root, "--out", tmp_path / "out") == 0
    expected = np.vectorize({0: 0, 3: 5, 9: 4, 255: 255}.get)(labels)
    assert np.array_equal(read_labels(tmp_path / "out" / "gt_masks" / "b.png"), expected)
    assert (tmp_path / "out" / "classes.txt").read_text().startswith("0: background\n1: low_hand\n2: torso\n")


def test_labels_that_the_class_list_lacks_and_double_masks_are_told_by_id(tmp_path, monkeypatch):
    root = masks(tmp_path / "own", {"a": every_label(), "b": every_label(), "c": every_label(77)}, STANDARD_CLASSES)
    masks(tmp_path / "other", {"d": every_label()}, None, ".npy")
    for name in ("d.png", "d.npy"):
        source = (tmp_path / "other/gt_masks/d.npy") if name == "d.npy" else root / "gt_masks" / "a.png"
        (root / "gt_masks" / name).write_bytes(source.read_bytes())
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "gt_masks" / "e f.png")
    assert run(monkeypatch, root, "--out", tmp_path / "out") == 1
    problems = record_of(tmp_path / "out")["problems"]
    assert sorted(problems) == ["c", "d", "e f"]
    assert "77" in problems["c"]


# ---- finding, splitting, writing ---------------------------------------------------------------------------


def test_folders_given_one_by_one_need_no_source(tmp_path, monkeypatch):
    for sample_id in ("a", "b"):
        person(sample_id, tmp_path)
    (tmp_path / "Annotations_Part").rename(tmp_path / "x")
    (tmp_path / "JPEGImages").rename(tmp_path / "y")
    out = tmp_path / "out"
    assert run(monkeypatch, "--annotations", tmp_path / "x", "--photos", tmp_path / "y", "--out", out) == 0
    assert (out / "gt_masks" / "a.png").is_file()


def test_two_possible_sources_are_named_and_masks_that_nothing_explains_are_none(tmp_path, monkeypatch):
    root = masks(tmp_path / "both", {"a": every_label(), "b": every_label()}, STANDARD_CLASSES)
    person("c", root)
    person("d", root)
    with pytest.raises(UserError, match=r"Annotations_Part.*gt_masks; choose by --annotations"):
        run(monkeypatch, root, "--out", tmp_path / "out")
    (root / "classes.txt").unlink()
    assert run(monkeypatch, root, "--out", tmp_path / "out") == 0
    assert sorted(p.stem for p in (tmp_path / "out" / "gt_masks").iterdir()) == ["c", "d"]


@pytest.mark.parametrize("missing", ["JPEGImages", "Annotations_Part"])
def test_a_missing_folder_is_named(tmp_path, monkeypatch, missing):
    person("a", tmp_path / "raw")
    (tmp_path / "raw" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=missing):
        run(monkeypatch, tmp_path / "raw", "--out", tmp_path / "out")


def test_lists_beside_the_masks_are_kept(tmp_path, monkeypatch):
    root = masks(tmp_path / "own", dict.fromkeys("abc", every_label()), STANDARD_CLASSES)
    (root / "train_id.txt").write_text("b\n")
    (root / "val_id.txt").write_text("c\na\n")
    assert run(monkeypatch, root, "--out", tmp_path / "out") == 0
    assert read_ids(tmp_path / "out" / "val_id.txt") == ["c", "a"]


def test_the_official_lists_are_complete_and_disjoint():
    train, val = (read_ids(tool.OFFICIAL[name]) for name in ("train", "val"))
    assert (len(train), len(val)) == (1716, 1817)
    assert not set(train) & set(val)


def test_a_users_folder_is_refused_and_moved_aside_only_when_told(tmp_path, monkeypatch):
    root = masks(tmp_path / "own", dict.fromkeys("ab", every_label()), STANDARD_CLASSES)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run(monkeypatch, root, "--out", out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert run(monkeypatch, root, "--out", out, "--overwrite") == 0
    assert [path.read_text() for path in tmp_path.glob("out.old-*/thesis.txt")] == ["mine"]
    assert not (out / "thesis.txt").exists()


def test_a_second_run_completes_the_folder_and_redoes_what_changed(tmp_path, monkeypatch):
    root = masks(tmp_path / "own", dict.fromkeys("abc", every_label()), STANDARD_CLASSES)
    out = tmp_path / "out"
    assert run(monkeypatch, root, "--out", out) == 0
    kept = (out / "gt_masks" / "a.png").stat().st_mtime_ns
    (out / "gt_masks" / "b.png").unlink()
    Image.fromarray(np.full((HEIGHT, WIDTH), 1, np.uint8)).save(root / "gt_masks" / "c.png")
    assert run(monkeypatch, root, "--out", out) == 0
    assert (out / "gt_masks" / "a.png").stat().st_mtime_ns == kept
    assert (read_labels(out / "gt_masks" / "c.png") == 4).all()
    assert (out / "gt_masks" / "b.png").is_file()
    with pytest.raises(UserError, match="seed was 0, is 5"):
        run(monkeypatch, root, "--out", out, "--seed", 5)
    assert not list(out.rglob("*.part"))


def test_the_source_is_never_the_output(tmp_path, monkeypatch):
    root = masks(tmp_path / "own", dict.fromkeys("ab", every_label()), STANDARD_CLASSES)
    with pytest.raises(UserError, match="holds the source"):
        run(monkeypatch, root, "--out", root, "--overwrite")
    assert (root / "gt_masks" / "a.png").is_file()


def test_an_output_inside_the_source_is_not_read_as_source(tmp_path, monkeypatch):
    root = masks(tmp_path / "own", dict.fromkeys("ab", every_label()), STANDARD_CLASSES)
    out = root / "prepared"
    assert run(monkeypatch, root, "--out", out) == 0
    assert run(monkeypatch, root, "--out", out) == 0


@pytest.mark.parametrize("copy", [False, True])
def test_photos_are_linked_or_copied(tmp_path, monkeypatch, copy):
    root = masks(tmp_path / "own", dict.fromkeys("ab", every_label()), STANDARD_CLASSES)
    assert run(monkeypatch, root, "--out", tmp_path / "out", *(["--copy"] if copy else [])) == 0
    made, origin = tmp_path / "out" / "JPEGImages" / "a.jpg", root / "JPEGImages" / "a.jpg"
    assert made.read_bytes() == origin.read_bytes()
    assert made.samefile(origin) is not copy


def test_no_usable_photo_at_all_is_an_error_that_lists_them(tmp_path, monkeypatch, capsys):
    root = masks(tmp_path / "own", {"a": every_label(), "b": every_label()}, "0: bg\n")
    with pytest.raises(UserError, match="no photo of 2"):
        run(monkeypatch, root, "--out", tmp_path / "out")
    assert "  a: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["src"],
        ["src", "--out", "o", "--val-share", "1.5"],
        ["src", "--check", "o"],
        ["src", "--out", "o", "--forma", "raw"],
    ],
)
def test_options_that_make_no_sense_end_with_status_2(monkeypatch, arguments):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2


# ---- --check -----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> Path:
    root = masks(tmp_path / "own", dict.fromkeys("abcd", every_label(255)), STANDARD_CLASSES)
    assert run(monkeypatch, root, "--out", tmp_path / "out", "--copy") == 0
    return tmp_path / "out"


def test_check_passes_a_prepared_folder_and_draws_the_sheet(prepared, monkeypatch, capsys):
    assert run(monkeypatch, "--check", prepared) == 0
    with Image.open(prepared / "contact_sheet.jpg") as sheet:
        assert sheet.width > 1000
    assert "at fault: none" in capsys.readouterr().out


def test_check_finds_each_kind_of_damage(prepared, monkeypatch, capsys):
    (prepared / "JPEGImages" / "a.jpg").unlink()
    (prepared / "gt_masks" / "b.png").write_bytes(b"no picture")
    photo(prepared / "JPEGImages", "c", (4, 4))
    Image.fromarray(every_label(44)).save(prepared / "gt_masks" / "d.png")
    photo(prepared / "JPEGImages", "stranger")
    (prepared / "classes.txt").write_text(STANDARD_CLASSES)
    (prepared / "val_id.txt").write_text("a\nghost\n")
    (prepared / "train_id.txt").write_text("a\nb\nc\nd\n")
    assert run(monkeypatch, "--check", prepared) == 1
    told = capsys.readouterr().out
    for sample_id in ("a", "b", "c", "d", "ghost"):
        assert f"  {sample_id}: " in told
    assert "label 44 at row" in told
    assert "not in the tree's order" in told
    assert "in both train and val: a" in told
    assert "such as that of stranger" in told


def test_check_names_the_folder_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        run(monkeypatch, "--check", tmp_path / "nothing")
