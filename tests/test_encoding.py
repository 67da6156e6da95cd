"""Masks -> label maps and encoding.json: what is written, refused, and left after a kill."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.kill import kill_at
from tools import dataset_hie_enc
from utils.dataset import find_samples
from utils.encoder import LOCK, Encoder
from utils.encoding import RECORD, check_encoded, load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.images import read_labels

IDS = Path("ids.txt")
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
        write_photo(tmp_path, sample, labels.shape[::-1])
    write_mask(tmp_path, "a", LABELS["a"])
    np.save(tmp_path / "gt_masks" / "b.npy", LABELS["b"].astype(np.int64))
    return tmp_path


def write_mask(folder, sample, labels):
    Image.fromarray(labels).save(folder / "gt_masks" / f"{sample}.png")


def write_photo(folder, sample, size, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(folder / "JPEGImages" / f"{sample}.jpg", exif=exif)


def encode(folder, tree, **wishes):
    return Encoder(folder / "gt_masks", folder / "JPEGImages", folder / "hie", tree, **wishes).run()


def encoding_of(folder, tree, **changes):
    return load_encoding(folder / "hie", Hierarchy.from_dict(tree.to_dict() | changes))


def state(folder):
    """Content of all files, and the time of the maps."""
    files = [path for path in (folder / "hie").iterdir() if path.name[0] != "."]
    return {path.name: (path.suffix == ".png" and path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_labels_stay_what_they_are_and_counts_are_those_of_a_plain_loop(folder, tree):
    assert encode(folder, tree) == 2
    assert sorted(state(folder)) == ["a.png", "b.png", RECORD]
    for sample, labels in LABELS.items():
        assert (read_labels(folder / "hie" / f"{sample}.png") == labels).all()
    with Image.open(folder / "hie" / "b.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((0, 1)) == tree.colours[7]
    encoding = encoding_of(folder, tree)
    for v in range(tree.num_nodes):
        below = [u for u in range(tree.num_nodes) if v in tree.paths[u]]
        assert encoding.pixels[v] == sum(int(np.isin(labels, below).sum()) for labels in LABELS.values())
        assert encoding.photos[v] == sum(bool(np.isin(labels, below).any()) for labels in LABELS.values())
    assert encoding.total == sum(labels.size for labels in LABELS.values())


def test_a_second_run_does_only_what_is_missing_or_changed(folder, tree):
    encode(folder, tree)
    before = state(folder)
    os.utime(folder / "gt_masks" / "b.npy", (1, 1))
    assert encode(folder, tree) == 0
    assert state(folder)["b.png"] == before["b.png"]

    write_mask(folder, "a", np.zeros((2, 4), np.uint8))
    assert encode(folder, tree) == 1
    assert encoding_of(folder, tree).pixels[tree.names.index("head")] == 0
    assert state(folder)["b.png"] == before["b.png"]

    (folder / "hie" / "b.png").unlink()
    assert encode(folder, tree) == 1
    assert (read_labels(folder / "hie" / "b.png") == LABELS["b"]).all()

    nodes = tree.to_dict()["nodes"]
    nodes[1]["colour"] = [1, 2, 3]
    assert encode(folder, Hierarchy.from_dict(tree.to_dict() | {"nodes": nodes})) == 2
    (folder / "gt_masks" / "a.png").unlink()
    encode(folder, tree)
    assert sorted(state(folder)) == ["b.png", RECORD]


def test_all_faulty_files_are_listed_and_the_rest_is_kept_for_the_next_run(folder, tree):
    write_mask(folder, "a", np.full((2, 4), 77, np.uint8))
    write_mask(folder, "c", np.zeros((4, 4), np.uint8))
    for sample in "def":
        write_mask(folder, sample, LABELS["a"])
        write_photo(folder, sample, (9, 9) if sample == "d" else (4, 2))
    np.save(folder / "gt_masks" / "e.npy", LABELS["a"])
    with pytest.raises(UserError) as error:
        encode(folder, tree)
    faults = ("a.png: label 77 at row 0, column 0", "no file for id 'c'", "e: it has two masks")
    for part in ("4 of 6", *faults, "d.png, for d.jpg: is 4x2 (width x height), the photo 9x9", "--skip-faulty"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="did not come to its end"):
        encoding_of(folder, tree)
    assert sorted(state(folder)) == ["b.png", RECORD, "f.png"]
    assert encode(folder, tree, ids=["f"]) == 0
    (folder / "hie" / "legend.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"1 PNGs that no run of the encoder wrote \(the first: legend\.png\)"):
        encode(folder, tree)


def test_only_what_the_lists_name_must_be_whole(folder, tree):
    (folder / "gt_masks" / "torn.png").write_bytes(b"no picture")
    write_photo(folder, "torn", (4, 2))
    assert encode(folder, tree, ids=["a", "b"]) == 2
    assert list(encoding_of(folder, tree).skipped) == ["torn"]
    with pytest.raises(UserError, match=r"2 of 3 masks (.|\n)*torn\.png cannot be read.*\n  nothing: it has no mask"):
        encode(folder, tree, ids=["a", "torn", "nothing"])
    assert encode(folder, tree, ids=["a", "torn"], skip_faulty=True) == 0
    encoding = encoding_of(folder, tree)
    check_encoded(encoding, ["a", "torn"], IDS, tolerate=1)
    with pytest.raises(UserError, match=r"ids\.txt: 1 of 2 ids .*the first: torn; .*cannot be read"):
        check_encoded(encoding, ["a", "torn"], IDS)
    with pytest.raises(UserError, match="2 of 2 ids"):
        check_encoded(encoding, ["torn", "never seen"], IDS, tolerate=2)
    find_samples(["a", "torn"], folder / "JPEGImages", folder / "hie", tolerate=1)
    with pytest.raises(UserError, match="1 of 2 ids lack"):
        find_samples(["a", "torn"], folder / "JPEGImages", folder / "hie")


UPRIGHT = np.array([[1, 0, 0, 2], [0, 3, 0, 4]], np.uint8)


@pytest.mark.parametrize(("orientation", "camera"), [(2, 0), (6, 2)])  # PIL's transposition that stores it so
def test_a_mask_of_the_stored_pixels_is_turned_with_its_photo(folder, tree, orientation, camera):
    encode(folder, tree)  # photos that were turned since are noticed, too
    stored = np.asarray(Image.fromarray(UPRIGHT).transpose(camera))
    write_photo(folder, "a", stored.shape[::-1], orientation)
    for mask, obey in ((UPRIGHT, True), (stored, False)):
        write_mask(folder, "a", mask)
        if orientation == 2:
            with pytest.raises(UserError, match=r"a: its photo is turned .*key obey_exif"):
                encode(folder, tree)
        else:  # on its side: the size of the mask tells
            encode(folder, tree)
            assert (read_labels(folder / "hie" / "a.png") == UPRIGHT).all()
            with pytest.raises(UserError, match=f"EXIF orientation {orientation} says"):
                encode(folder, tree, obey_exif=not obey)
        encode(folder, tree, obey_exif=obey)
        assert (read_labels(folder / "hie" / "a.png") == UPRIGHT).all()
    with pytest.raises(UserError, match="key 'obey_exif': is True, the masks were encoded with False"):
        check_encoded(encoding_of(folder, tree), ["a"], IDS, obey_exif=True)


def encode_and_die(folder: Path, tree: dict, event: str, pattern: str) -> None:
    kill_at(event, pattern)
    encode(folder, Hierarchy.from_dict(tree))


@pytest.mark.slow
@pytest.mark.parametrize("moment", [("os.rename", "*/b.png"), ("open", "*.a.png.*"), ("os.remove", "*/c.png")])
def test_a_killed_encoder_leaves_no_claim_that_lies_and_the_next_run_goes_on(folder, tree, moment):
    write_mask(folder, "c", LABELS["a"])
    write_photo(folder, "c", (4, 2))
    encode(folder, tree)
    (folder / "gt_masks" / "c.png").unlink()
    changed = {"a": np.zeros((2, 4), np.uint8), "b": LABELS["b"][::-1]}
    write_mask(folder, "a", changed["a"])
    np.save(folder / "gt_masks" / "b.npy", changed["b"])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.factory"])
    process = context.Process(target=encode_and_die, args=(folder, tree.to_dict(), *moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match="did not come to its end"):
        encoding_of(folder, tree)
    encode(folder, tree)
    assert set(encoding_of(folder, tree).files) == {"a", "b"}
    assert sorted(path.name for path in (folder / "hie").iterdir()) == [LOCK, "a.png", "b.png", RECORD]
    assert all((read_labels(folder / "hie" / f"{i}.png") == changed[i]).all() for i in changed)


def test_a_second_encoder_is_refused_while_the_first_is_at_work(folder, tree):
    (folder / "hie").mkdir()
    with FileLock(folder / "hie" / LOCK), pytest.raises(UserError, match="is being written by another process"):
        encode(folder, tree)
    assert encode(folder, tree) == 2
    os.rename(folder / "JPEGImages" / "a.jpg", os.fsencode(folder / "JPEGImages") + b"/caf\xe9.jpg")  # Latin-1
    with pytest.raises(UserError, match=r"caf.udce9\.jpg'\): its name is not UTF-8; rename it"):
        encode(folder, tree)


def test_masks_that_changed_or_went_after_encoding_are_named_and_touched_ones_let_pass(folder, tree):
    encode(folder, tree)
    encoding, mask = encoding_of(folder, tree), folder / "gt_masks" / "a.png"

    def refused(encoding=encoding):
        with pytest.raises(UserError, match=r"1 masks in .*the first: that of a has changed or is gone.*hie_enc"):
            check_encoded(encoding, ["b", "a"], IDS)

    data = bytearray(mask.read_bytes())
    data[-20] ^= 1
    mask.write_bytes(data)  # of the same size
    refused()
    mask.unlink()
    (folder / "elsewhere").mkdir()
    for name in ("gt_masks", "hie"):  # a data set that moved as a whole
        (folder / name).rename(folder / "elsewhere" / name)
    refused(encoding_of(folder / "elsewhere", tree))
    shutil.rmtree(folder / "elsewhere" / "gt_masks")  # label maps that were sent on alone
    check_encoded(encoding_of(folder / "elsewhere", tree), ["a", "b"], IDS)


@pytest.mark.parametrize("damage", ["", "files", "format"])
def test_an_encoding_that_is_missing_damaged_or_of_another_tree_is_refused(folder, tree, damage):
    encode(folder, tree)
    with pytest.raises(UserError, match=r"with the tree 'pascal_part' .*ids, names or parents differ"):
        encoding_of(folder, tree, ignore_index=200)
    path = folder / "hie" / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {damage: {"a": 3}})) if damage else path.unlink()
    with pytest.raises(UserError, match=r"encoding\.json .*dataset_hie_enc"):
        encoding_of(folder, tree)


def test_the_tool_asks_what_values_mean_and_draws_a_split_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    words, lists = ["", "--gtdatadir", "gt_masks", "--save_dir", "hie", "--split", "0.5"], []
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="--assume-order"):
        dataset_hie_enc.main()
    for seed in "05":
        monkeypatch.setattr("sys.argv", [*words, "--assume-order", "--seed", seed])
        dataset_hie_enc.main()
        lists.append([(folder / f"{name}_id.txt").read_text() for name in ("train", "val")])
    assert sorted(lists[0]) == ["a\n", "b\n"]
    assert lists[1] == lists[0], "kept"
