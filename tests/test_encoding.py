import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils.encoding
import utils.parallel
from utils.encoding import LOCK, RECORD, STAGING, check_classes, encode_folder, load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.images import read_labels

REPO = Path(__file__).resolve().parents[1]
LABELS = {
    "a": np.array([[0, 0, 1, 4], [2, 2, 255, 0]], np.uint8),
    "b": np.array([[3, 5], [7, 9], [0, 0]], np.uint8),  # 7 and 9 are inner nodes
}


@pytest.fixture
def folder(tmp_path):
    """Two photos; the mask of one is a PNG, of the other a NumPy array."""
    for name in ("JPEGImages", "gt_masks"):
        (tmp_path / name).mkdir()
    for sample, labels in LABELS.items():
        Image.new("RGB", labels.shape[::-1]).save(tmp_path / "JPEGImages" / f"{sample}.jpg")
    write_mask(tmp_path, "a", LABELS["a"])
    np.save(tmp_path / "gt_masks" / "b.npy", LABELS["b"].astype(np.int64))
    return tmp_path


def write_mask(folder, sample, labels):
    Image.fromarray(labels).save(folder / "gt_masks" / f"{sample}.png")


def encode(folder, tree):
    return encode_folder(folder / "gt_masks", folder / "JPEGImages", folder / "hie", tree)


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "hie").iterdir()}


def changed_tree(tree, **changes):
    return Hierarchy.from_dict(tree.to_dict() | changes)


# ---- what is written ---------------------------------------------------------------------------------------


def test_labels_stay_what_they_are_in_the_colours_of_the_tree(folder, tree):
    encode(folder, tree)
    for sample, labels in LABELS.items():
        assert (read_labels(folder / "hie" / f"{sample}.png") == labels).all()
    with Image.open(folder / "hie" / "b.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((0, 1)) == tree.colours[7]
    assert sorted(path.name for path in (folder / "hie").iterdir()) == ["a.png", "b.png", RECORD]


def test_counts_are_those_of_a_plain_loop(folder, tree):
    encoding, _ = encode(folder, tree)
    assert encoding.ids == {"a", "b"}
    for v in range(tree.num_nodes):
        below = [u for u in range(tree.num_nodes) if v in tree.paths[u]]
        assert encoding.labelled[v] == sum(int((labels == v).sum()) for labels in LABELS.values())
        assert encoding.pixels[v] == sum(int(np.isin(labels, below).sum()) for labels in LABELS.values())
        assert encoding.photos[v] == sum(bool(np.isin(labels, below).any()) for labels in LABELS.values())
    assert encoding.ignored == 1
    assert json.loads((folder / "hie" / RECORD).read_text())["paths"]["head"] == ["body", "upper_body", "head"]


def test_a_second_run_does_only_what_is_missing_or_changed(folder, tree):
    assert encode(folder, tree)[1] == 2
    before = state(folder)
    assert encode(folder, tree)[1] == 0
    assert state(folder) == before

    write_mask(folder, "a", np.zeros((2, 4), np.uint8))
    encoding, changed = encode(folder, tree)
    assert changed == 1
    assert encoding.pixels[tree.names.index("head")] == 0
    assert state(folder)["b.png"] == before["b.png"]

    (folder / "hie" / "b.png").unlink()
    assert encode(folder, tree)[1] == 1
    assert (read_labels(folder / "hie" / "b.png") == LABELS["b"]).all()


def test_a_mask_that_was_only_touched_is_not_encoded_again(folder, tree):
    encode(folder, tree)
    os.utime(folder / "gt_masks" / "a.png", (1, 1))
    assert encode(folder, tree)[1] == 0


def test_a_mask_that_is_gone_goes_from_the_encoding(folder, tree):
    encode(folder, tree)
    (folder / "gt_masks" / "a.png").unlink()
    assert encode(folder, tree)[0].ids == {"b"}
    assert not (folder / "hie" / "a.png").exists()


@pytest.mark.parametrize("changes", [{"name": "other"}, {"ignore_index": 254}])
def test_a_mask_that_is_gone_goes_from_the_encoding_of_another_tree(folder, tree, changes):
    encode(folder, tree)
    (folder / "gt_masks" / "a.png").unlink()
    assert encode(folder, changed_tree(tree, **changes))[0].ids == {"b"}
    assert sorted(path.name for path in (folder / "hie").iterdir()) == ["b.png", RECORD]
    assert not (folder / "hie.old1").exists(), "nothing of unknown origin"


def test_pngs_that_no_run_lists_are_moved_aside_whole(folder, tree, capsys):
    """One with the id of a mask, which would be overwritten, and one without."""
    encode(folder, tree)
    write_mask(folder, "c", LABELS["a"])
    shutil.copy(folder / "JPEGImages" / "a.jpg", folder / "JPEGImages" / "c.jpg")
    for name in ("c.png", "legend.png"):
        (folder / "hie" / name).write_bytes(b"mine")
    (folder / "hie.old1").mkdir()
    assert encode(folder, tree)[1] == 1
    assert sorted(path.name for path in (folder / "hie").iterdir()) == ["a.png", "b.png", "c.png", RECORD]
    assert (read_labels(folder / "hie" / "c.png") == LABELS["a"]).all()
    for name in ("c.png", "legend.png"):
        assert (folder / "hie.old2" / name).read_bytes() == b"mine"
    assert f"2 PNGs that its {RECORD} does not list" in capsys.readouterr().err
    assert encode(folder, tree)[1] == 0
    assert "does not list" not in capsys.readouterr().err


def test_other_colours_colour_every_file_again(folder, tree):
    encode(folder, tree)
    nodes = tree.to_dict()["nodes"]
    nodes[1]["colour"] = [1, 2, 3]
    assert encode(folder, changed_tree(tree, nodes=nodes))[1] == 2


# ---- what is refused ---------------------------------------------------------------------------------------


def test_an_unknown_label_is_named_with_its_place(folder, tree):
    write_mask(folder, "a", np.array([[0, 0, 0, 0], [0, 0, 10, 10]], np.uint8))
    with pytest.raises(UserError, match=r"a\.png: label 10 at row 1, column 2 \(2 pixels\)"):
        encode(folder, tree)


def test_all_faulty_files_are_listed_and_nothing_is_written(folder, tree):
    write_mask(folder, "a", np.zeros((4, 4), np.uint8))
    np.save(folder / "gt_masks" / "b.npy", LABELS["b"] * 0.5)
    write_mask(folder, "c", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError) as error:
        encode(folder, tree)
    message = str(error.value)
    assert message.startswith("3 of 3 masks")
    assert "a.png: is 4x4 (width x height), its photo a.jpg is 4x2" in message
    assert "b.npy holds float64" in message
    assert "no file for id 'c'" in message
    assert not (folder / "hie").exists()


def test_a_fault_leaves_an_earlier_encoding_whole(folder, tree):
    encode(folder, tree)
    before = state(folder)
    write_mask(folder, "a", np.full((2, 4), 77, np.uint8))
    with pytest.raises(UserError, match="label 77"):
        encode(folder, tree)
    assert state(folder) == before


def test_a_photo_replaced_by_one_of_another_size_is_noticed(folder, tree):
    encode(folder, tree)
    Image.new("RGB", (9, 9)).save(folder / "JPEGImages" / "a.jpg")
    with pytest.raises(UserError, match="is 9x9"):
        encode(folder, tree)


def test_two_masks_of_one_photo_are_refused(folder, tree):
    write_mask(folder, "b", LABELS["b"])
    with pytest.raises(UserError, match=r"two masks of 'b'"):
        encode(folder, tree)


def test_the_standard_order_of_parts_is_refused(tree):
    standard = dict(enumerate(["background", "head", "torso", "up_hand", "low_hand", "up_leg", "low_leg"]))
    with pytest.raises(UserError, match="1 is 'head', in the tree 'low_hand'"):
        check_classes(standard, tree, "classes.txt")
    fitting = {leaf: tree.names[leaf] for leaf in tree.leaves}
    check_classes(fitting | {255: "void"}, tree, "classes.txt")
    with pytest.raises(UserError, match=r"6 \('up_hand'\) is missing"):
        check_classes({v: name for v, name in fitting.items() if v != 6}, tree, "classes.txt")


# ---- killed, or two at a time ------------------------------------------------------------------------------


def encode_and_die(folder: Path, tree: dict, point: str) -> None:
    """Encodes in a process of its own, which kills itself at a point."""

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(path, *_) -> None:
        path.write_bytes(b"half")
        die()

    module = utils.encoding
    if point == "while a mask is encoded":
        module.write_indexed = write_half
    elif point == "before the first file is moved":
        module.os.replace = lambda source, target: (
            die() if Path(target).parent.name == "hie" else os.rename(source, target)
        )
    elif point == "before the record is moved":
        module.os.replace = lambda source, target: die() if Path(target).name == RECORD else os.rename(source, target)
    encode(folder, Hierarchy.from_dict(tree))


@pytest.fixture
def kill(folder, tree):
    """Encodes in another process that is killed at a point."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])

    def run(point: str) -> None:
        process = context.Process(target=encode_and_die, args=(folder, tree.to_dict(), point))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert (folder / "hie" / STAGING / LOCK).is_file(), "something is left behind"

    return run


PUBLISHING = ["before the first file is moved", "before the record is moved"]


@pytest.mark.parametrize("point", ["while a mask is encoded", *PUBLISHING])
def test_a_killed_encoder_is_never_taken_as_finished_and_the_next_run_clears_its_remains(folder, tree, kill, point):
    kill(point)
    with pytest.raises(UserError, match="not encoded yet"):
        load_encoding(folder / "hie", tree)
    assert encode(folder, tree)[1] == 2
    assert sorted(path.name for path in (folder / "hie").iterdir()) == ["a.png", "b.png", RECORD]
    for sample, labels in LABELS.items():
        assert (read_labels(folder / "hie" / f"{sample}.png") == labels).all()


@pytest.mark.parametrize("point", ["while a mask is encoded", *PUBLISHING])
def test_killed_over_an_earlier_encoding_the_earlier_one_or_none_is_there(folder, tree, kill, point):
    encode(folder, tree)
    before = state(folder)
    write_mask(folder, "a", np.zeros((2, 4), np.uint8))
    kill(point)
    if point in PUBLISHING:
        with pytest.raises(UserError, match="not encoded yet"):
            load_encoding(folder / "hie", tree)
    else:
        assert {name: (folder / "hie" / name).read_bytes() for name in before} == {k: v for k, (_, v) in before.items()}
    encoding, _ = encode(folder, tree)
    assert encoding.ignored == 0, "the new mask has no void pixel"
    assert sorted(path.name for path in (folder / "hie").iterdir()) == ["a.png", "b.png", RECORD]


@pytest.mark.parametrize("point", PUBLISHING)
def test_a_mask_that_went_after_a_killed_publish_leaves_no_label_map(folder, tree, kill, point):
    encode(folder, tree)
    write_mask(folder, "a", np.zeros((2, 4), np.uint8))
    kill(point)
    (folder / "gt_masks" / "b.npy").unlink()
    assert encode(folder, tree)[0].ids == {"a"}
    assert sorted(path.name for path in (folder / "hie").iterdir()) == ["a.png", RECORD]
    assert (read_labels(folder / "hie.old1" / "b.png") == LABELS["b"]).all(), "kept: its origin is not known"


def die_at_seven(item: int) -> int:
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_ends_the_work_with_a_message(monkeypatch):
    monkeypatch.setattr(utils.parallel, "_available_cores", lambda: 2)
    with pytest.raises(UserError, match="encoding: a worker process was killed"):
        utils.parallel.map_with_progress(die_at_seven, range(100), "encoding")


def test_a_folder_of_someone_else_is_not_cleared(folder, tree):
    mine = folder / "hie" / STAGING / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(UserError, match="is in the way"):
        encode(folder, tree)
    assert mine.is_file()


def test_a_second_encoder_is_refused_while_the_first_is_at_work(folder, tree):
    lock = folder / "hie" / STAGING / LOCK
    lock.parent.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        half = lock.with_name("a.png")
        half.write_bytes(b"of the first")
        with pytest.raises(UserError, match="is being written by another process"):
            encode(folder, tree)
        assert half.is_file()
        owner.communicate(b"\n")
    assert encode(folder, tree)[1] == 2


# ---- what training asks ------------------------------------------------------------------------------------


def test_an_encoding_of_another_tree_is_refused(folder, tree):
    encode(folder, tree)
    load_encoding(folder / "hie", tree)
    cityscapes = Hierarchy.load(REPO / "configs" / "hierarchies" / "cityscapes.json")
    with pytest.raises(UserError, match="'pascal_part', this experiment uses"):
        load_encoding(folder / "hie", cityscapes)
    with pytest.raises(UserError, match="ignore_index"):
        load_encoding(folder / "hie", changed_tree(tree, ignore_index=200))
    nodes = tree.to_dict()["nodes"]
    nodes[1]["parent"] = 9
    with pytest.raises(UserError, match="changed since"):
        load_encoding(folder / "hie", changed_tree(tree, nodes=nodes))


@pytest.mark.parametrize("damage", ["absent", "cut", "list", "no nodes"])
def test_a_missing_or_damaged_encoding_says_what_to_run(folder, tree, damage):
    encode(folder, tree)
    path = folder / "hie" / RECORD
    text = path.read_text()
    path.unlink()
    if damage != "absent":
        no_nodes = json.dumps(json.loads(text) | {"nodes": {}})
        path.write_text({"cut": text[:200], "list": "[]", "no nodes": no_nodes}[damage])
    with pytest.raises(UserError, match=r"encoding\.json.*dataset_hie_enc\.py"):
        load_encoding(folder / "hie", tree)


# ---- the tool ----------------------------------------------------------------------------------------------


def run_tool(cwd, *arguments):
    command = [sys.executable, REPO / "tools" / "dataset_hie_enc.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_tool_works_from_any_folder_and_asks_what_labels_mean(folder):
    result = run_tool(folder, "--gtdatadir", "gt_masks", "--save_dir", "hie")
    assert (result.returncode, result.stderr.count("error:")) == (2, 1)
    assert "--assume-order" in result.stderr
    result = run_tool(folder, "--gtdatadir", "gt_masks", "--save_dir", "hie", "--assume-order")
    assert result.returncode == 0, result.stderr
    assert "2 masks, 2 of them new" in result.stdout


def test_the_real_masks_agree_with_the_tree_and_their_class_list(pascal_part_root, tree, tmp_path):
    """A dozen real masks; the whole set takes too long for a test."""
    (tmp_path / "gt_masks").mkdir()
    masks = sorted((pascal_part_root / "gt_masks").iterdir())[::300]
    for mask in masks:
        (tmp_path / "gt_masks" / mask.name).write_bytes(mask.read_bytes())
    encoding, _ = encode_folder(tmp_path / "gt_masks", pascal_part_root / "JPEGImages", tmp_path / "hie", tree)
    assert encoding.photos[tree.names.index("body")] == len(masks)
