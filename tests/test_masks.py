"""Ids, id lists, class lists, and every way to write a mask: all lead to the labels that are meant."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.config import Config
from tools.dataset_hie_enc import write_lists
from utils.encoder import Encoder
from utils.encoding import load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder, draw_split, read_ids
from utils.images import VOID_COLOUR, read_labels
from utils.masks import MaskReader, find_masks, read_classes

TREES = Path(__file__).resolve().parents[1] / "configs" / "hierarchies"
PASCAL = Hierarchy.load(TREES / "pascal_part.json")
NAMES = ["background", "head", "torso", "traffic_light", "HEAD"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_ids_keep_their_order_whatever_editor_wrote_them(tmp_path, encoding):
    (tmp_path / "ids.txt").write_bytes("2008_2\r\n\r\n photo 1 \r\n2007.é\n".encode(encoding))
    assert read_ids(tmp_path / "ids.txt") == ["2008_2", "photo 1", "2007.é"]


BAD_IDS = ["../x", "a\\b", ".x", "c:x", "a\0b", "a  1", "a\t1", "x.PNG", "ok", "x" * 201]


@pytest.mark.parametrize("content", [b"\n \n", b"\xff\xfe\x00", b"\xe9\n", *BAD_IDS])
def test_what_is_no_list_of_ids_is_refused_with_file_and_line(tmp_path, content):
    where = r"ids\.txt, line 3" if content in BAD_IDS else r"ids\.txt"
    (tmp_path / "ids.txt").write_bytes(f"ok\n\n{content}\n".encode() if content in BAD_IDS else content)
    with pytest.raises(UserError, match=where):
        read_ids(tmp_path / "ids.txt")


def test_photos_are_found_by_id_in_any_unicode_form_and_two_of_one_id_are_refused(tmp_path):
    names = ("a.JPG", "b.jpg", "b.png", unicodedata.normalize("NFD", "café 1.jpg"), "c.txt", ".d.jpg")
    for name in (*names, "deep/er/f.jpg", "deep/.er/g.jpg", "deep/er/.h.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(PhotoFolder(tmp_path / "deep").paths) == ["f"]
    photos = PhotoFolder(tmp_path)
    assert photos.find("a").name == "a.JPG"
    assert photos.find("café 1").is_file()
    for sample_id, fault in (("c", "no file for id 'c'"), ("f", "no file for id 'f'"), ("b", "'b' has several photos")):
        with pytest.raises(UserError, match=fault):
            photos.find(sample_id)


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    ids = [f"p{number:02}" for number in range(20)]
    split = draw_split(ids, 0.25, 1)
    assert sorted(split["train"] + split["val"]) == ids
    assert len(split["val"]) == 5
    assert split == draw_split(ids[::-1], 0.25, 1) != draw_split(ids, 0.25, 2)
    assert [len(part) for part in draw_split("ab", 0.01, 0).values()] == [1, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0: bg\n1 head\n\r\n2,Torso\n", {"0": "background", "1": "head", "2": "torso"}),
        ("HEAD: 1, head: 2, Head: 3", {"1": "HEAD", "2": "head", "3": "head"}),
        ("head: 24, torso: 25 26", {"24": "head", "25": "torso", "26": "torso"}),
        ("# mine\n24: head\nhead: 025\nvoid: *", {"24": "head", "25": "head", "*": "void"}),
        ("Traffic Light: #DC143C, 3\nunlabelled = 0", {"#dc143c": "traffic_light", "3": "traffic_light", "0": "void"}),
        ("0: bg\n1: hed\n", "'1: hed' names no class of the tree, did you mean 'head'"),
        ("head: 1, torso: 1", "repeats"),
        ("1: bg\nhead\n", "'head' has no value"),
        ("\n", "is empty"),
    ],
)
def test_class_lists_of_every_style_are_read_and_others_refused(tmp_path, text, expected):
    (tmp_path / "classes.txt").write_text(text)
    if isinstance(expected, dict):
        assert read_classes(tmp_path / "classes.txt", NAMES) == expected
    else:
        with pytest.raises(UserError, match=expected):
            read_classes(tmp_path / "classes.txt", NAMES)


LABELS = np.array([[0, 0, 1, 4], [2, 3, 255, 6]], np.uint8)
INNER = np.where(LABELS == 6, 8, LABELS)
OWN = {str(leaf): PASCAL.names[leaf] for leaf in PASCAL.leaves}
VALUES = np.array([[0, 24, 25, 40000], [24, 0, 255, 9]], np.uint16)
MERGED = {"0": "background", "24": "head", "25": "head", "9": "void"}
MEANT = [[0, 4, 4, 2], [4, 0, 255, 255]]
USUAL = np.array([[0, 1, 2, 3], [4, 5, 6, 255]], np.uint8)  # as the tree's ids, they would put arms into the lower body
COLOURS = np.zeros((256, 3), np.uint8)
COLOURS[: PASCAL.num_nodes], COLOURS[255] = PASCAL.colours, VOID_COLOUR
OPAQUE = np.dstack([COLOURS[LABELS], np.full_like(LABELS, 255)])
ODD = COLOURS[LABELS]
ODD[0, 1] = (1, 2, 3)
HEAD = np.where([[0, 1, 0, 0], [0] * 4], 4, LABELS)


def write_mask(path: Path, values: np.ndarray, palette: np.ndarray | None = None) -> Path:
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette.ravel().tolist())
    np.save(path, values) if path.suffix == ".npy" else image.save(path)
    return path


@pytest.mark.parametrize(
    ("values", "classes", "meant"),
    [
        (INNER, OWN, INNER),
        (VALUES, MERGED | {"40000": "torso"}, MEANT),
        (VALUES, MERGED | {"*": "torso"}, MEANT),
        (USUAL, {"0": "background", "*": "head"}, [[0, 4, 4, 4], [4, 4, 4, 255]]),
        (USUAL, read_classes(TREES / "pascal_part_classes.txt", PASCAL.names), [[0, 4, 2, 6], [1, 5, 3, 255]]),
        (COLOURS[LABELS], None, LABELS),
        (OPAQUE, None, LABELS),
        (ODD, {"#010203": "background"}, LABELS),
        (ODD, {"*": "head"}, HEAD),
        (ODD, None, r"a\.png: the colour #010203 at row 0, column 1 \(1 pixels "),
        (VALUES, MERGED, r"label 40000 at row 0, column 3 \(1 pixels .*classes\.txt"),
        (np.array([[0, 10], [11, 0]], np.uint8), None, r"label 10 at row 0, column 1 \(2 pixels have such\) is not of"),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_values_and_colours_become_the_labels_that_they_stand_for(tmp_path, values, classes, meant, suffix):
    path = write_mask(tmp_path / f"a{suffix if values.ndim == 2 else '.png'}", values)
    if isinstance(meant, str):
        with pytest.raises(UserError, match=meant.replace("png", path.suffix[1:])):
            MaskReader(PASCAL, classes).read(path)
    else:
        assert MaskReader(PASCAL, classes).read(path).tolist() == np.array(meant).tolist()


def test_other_colours_of_a_palette_say_nothing_and_the_tree_s_at_other_indices_are_refused(tmp_path):
    """What a PNG optimiser leaves: the most frequent colour first."""
    values, other = INNER.clip(0, 9), np.arange(30, dtype=np.uint8).reshape(10, 3) + 90
    assert (MaskReader(PASCAL, None).read(write_mask(tmp_path / "a.png", values, other)) == values).all()
    with pytest.raises(UserError, match=r"index 1 has the colour of label 2 .*Save the mask in grey"):
        MaskReader(PASCAL, None).read(write_mask(tmp_path / "a.png", values, COLOURS[[0, 2, 1, 3, 4, 5, 6]]))


def test_the_cityscapes_layout_is_encoded_as_it_comes(tmp_path):
    cityscapes = Hierarchy.load(TREES / "cityscapes.json")
    classes = read_classes(TREES / "cityscapes_classes.txt", cityscapes.names)
    for split, city, label in (("train", "aachen", 24), ("train", "bochum", 7), ("val", "ulm", 23)):
        stem = f"{city}_000000_000019"
        photos, masks = tmp_path / "leftImg8bit" / split / city, tmp_path / "gtFine" / split / city
        for folder in (photos, masks):
            folder.mkdir(parents=True)
        Image.new("RGB", (4, 2)).save(photos / f"{stem}_leftImg8bit.png")
        Image.fromarray(np.array([[label] * 4, [0, 1, 9, 33]], np.uint8)).save(masks / f"{stem}_gtFine_labelIds.png")
        Image.new("RGBA", (4, 2)).save(masks / f"{stem}_gtFine_color.png")
        Image.fromarray(np.full((2, 4), 26001, np.uint16)).save(masks / f"{stem}_gtFine_instanceIds.png")
        (masks / f"{stem}_gtFine_polygons.json").touch()
    assert Encoder(tmp_path / "gtFine", tmp_path / "leftImg8bit", tmp_path / "hie", cityscapes, classes).run() == 3
    encoding = load_encoding(tmp_path / "hie", cityscapes)
    expected = [[11] * 4, [255, 255, 255, 18]]
    assert read_labels(tmp_path / "hie" / "aachen_000000_000019.png").tolist() == expected
    config = Config(root_data_dir=str(tmp_path), train_sample_ids_file="lists/train.txt")
    write_lists(config, "folders", 0, {i: record["source"] for i, record in encoding.files.items()})
    assert read_ids(tmp_path / "lists" / "train.txt") == ["aachen_000000_000019", "bochum_000000_000019"]
    assert read_ids(tmp_path / "val_id.txt") == ["ulm_000000_000019"]


def test_an_ending_belongs_to_the_id_where_a_photo_says_so(tmp_path):
    (tmp_path / "masks").mkdir()
    for photo, mask in (("a", "a_mask"), ("b_mask", "b_mask"), ("c d", "c d_segmentation")):
        (tmp_path / f"{photo}.jpg").touch()
        (tmp_path / "masks" / f"{mask}.png").touch()
    assert list(find_masks(tmp_path / "masks", PhotoFolder(tmp_path))) == ["a", "b_mask", "c d"]
