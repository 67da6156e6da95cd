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
from utils.masks import read_classes

TREES = Path(__file__).resolve().parents[1] / "configs" / "hierarchies"
LABELS = np.array([[0, 0, 1, 4], [2, 3, 255, 6]], np.uint8)
NAMES = ["background", "head", "torso", "traffic_light"]


# ---- ids ---------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="nowhere does not exist"):
        PhotoFolder(tmp_path / "nowhere")


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    ids = [f"p{number:02}" for number in range(20)]
    split = draw_split(ids, 0.25, 1)
    assert sorted(split["train"] + split["val"]) == ids
    assert len(split["val"]) == 5
    assert split == draw_split(ids[::-1], 0.25, 1) != draw_split(ids, 0.25, 2)
    assert [len(part) for part in draw_split("ab", 0.01, 0).values()] == [1, 1]


# ---- class lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0: bg\n1 head\n2,Torso\n", {"0": "background", "1": "head", "2": "torso"}),
        ("head: 24, torso: 25 26", {"24": "head", "25": "torso", "26": "torso"}),
        ("# mine\n24: head\nhead: 025\nvoid: *", {"24": "head", "25": "head", "*": "void"}),
        ("Traffic Light: #DC143C, 3\nunlabelled = 0", {"#dc143c": "traffic_light", "3": "traffic_light", "0": "void"}),
    ],
)
def test_class_lists_of_every_style_are_read(tmp_path, text, expected):
    (tmp_path / "classes.txt").write_text(text)
    assert read_classes(tmp_path / "classes.txt", NAMES) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0: bg\n1: hed\n", "'1: hed' names no class of the tree, did you mean 'head'"),
        ("head: 1, torso: 1", "repeats"),
        ("1: bg\nhead\n", "has no value"),
        ("\n", "is empty"),
    ],
)
def test_class_lists_that_do_not_fit_the_tree_are_refused(tmp_path, text, words):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        read_classes(tmp_path / "classes.txt", NAMES)


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.fixture
def encode(tmp_path, tree):
    """Encodes one mask, whose photo is as large, and gives its label map."""

    def run(write, classes=None) -> np.ndarray:
        for name in ("photos", "masks"):
            (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", LABELS.shape[::-1]).save(tmp_path / "photos" / "a.jpg")
        write(tmp_path / "masks")
        Encoder(tmp_path / "masks", tmp_path / "photos", tmp_path / "hie", tree, classes).run()
        return read_labels(tmp_path / "hie" / "a.png")

    return run


def test_colours_of_the_tree_are_read_from_rgb_and_opaque_rgba(encode, tree):
    lookup = np.zeros((256, 3), np.uint8)
    lookup[: tree.num_nodes], lookup[255] = tree.colours, VOID_COLOUR
    picture = Image.fromarray(lookup[LABELS])
    for mode in ("RGB", "RGBA"):
        assert (encode(lambda folder, mode=mode: picture.convert(mode).save(folder / "a.png")) == LABELS).all()
    picture.putpixel((1, 0), (1, 2, 3))
    with pytest.raises(UserError, match=r"a\.png: the colour #010203 at row 0, column 1 \(1 pixels "):
        encode(lambda folder: picture.save(folder / "a.png"))
    assert (encode(lambda folder: picture.save(folder / "a.png"), {"#010203": "background"}) == LABELS).all()
    expected = LABELS.copy()
    expected[0, 1] = 4
    assert (encode(lambda folder: picture.save(folder / "a.png"), {"*": "head"}) == expected).all()


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_values_above_a_byte_are_merged_by_their_classes(encode, suffix):
    values = np.array([[0, 24, 25, 40000], [24, 0, 255, 9]], np.uint16)

    def write(folder):
        Image.fromarray(values).save(folder / "a.png") if suffix == ".png" else np.save(folder / "a.npy", values)

    classes = {"0": "background", "24": "head", "25": "head", "9": "void"}
    for torso in ("40000", "*"):
        assert encode(write, classes | {torso: "torso"}).tolist() == [[0, 4, 4, 2], [4, 0, 255, 255]]
    with pytest.raises(UserError, match=r"label 40000 at row 0, column 3 \(1 pixels .*classes\.txt"):
        encode(write, classes)


def test_masks_in_the_usual_order_of_pascal_person_part_reach_the_right_classes(encode, tree):
    """Read as the tree's ids, they would put arms into the lower body."""
    usual = np.array([[0, 1, 2, 3], [4, 5, 6, 255]], np.uint8)
    classes = read_classes(TREES / "pascal_part_classes.txt", tree.names)
    meant = [[0, 4, 2, 6], [1, 5, 3, 255]]  # written out by hand on purpose
    assert encode(lambda folder: Image.fromarray(usual).save(folder / "a.png"), classes).tolist() == meant


def test_a_class_list_of_the_tree_s_own_ids_leaves_inner_nodes_and_an_unknown_label_is_named(encode, tree):
    inner = np.where(LABELS == 6, 8, LABELS)
    classes = {str(leaf): tree.names[leaf] for leaf in tree.leaves}
    assert (encode(lambda folder: Image.fromarray(inner).save(folder / "a.png"), classes) == inner).all()
    strange = np.array([[0, 0, 0, 0], [0, 0, 10, 11]], np.uint8)
    with pytest.raises(UserError, match=r"label 10 at row 1, column 2 \(2 pixels have such\) is not of the tree"):
        encode(lambda folder: Image.fromarray(strange).save(folder / "a.png"))


def test_other_colours_of_a_palette_say_nothing_and_the_tree_s_at_other_indices_are_refused(encode, tree):
    """What a PNG optimiser leaves: the most frequent colour first."""
    values = np.where(LABELS == 255, 5, LABELS).astype(np.uint8)
    image = Image.fromarray(values).convert("L")
    image.putpalette([(90 + 7 * i) % 256 for i in range(30)])
    assert (encode(lambda folder: image.save(folder / "a.png", bits=4)) == values).all()
    image.putpalette([channel for v in (0, 2, 1, 3, 4, 5, 6) for channel in tree.colours[v]])
    with pytest.raises(UserError, match=r"index 1 has the colour of label 2 .*Save the mask in grey"):
        encode(lambda folder: image.save(folder / "a.png"))


# ---- layouts -----------------------------------------------------------------------------------------------


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
        Image.fromarray(np.zeros((2, 4), np.uint8)).save(masks / f"{stem}_gtFine_labelTrainIds.png")
        (masks / f"{stem}_gtFine_polygons.json").touch()
    assert Encoder(tmp_path / "gtFine", tmp_path / "leftImg8bit", tmp_path / "hie", cityscapes, classes).run() == 3
    encoding = load_encoding(tmp_path / "hie", cityscapes)
    assert sorted(encoding.files) == [f"{city}_000000_000019" for city in ("aachen", "bochum", "ulm")]
    assert {encoding.files[i]["source"].split("/")[0] for i in encoding.files} == {"train", "val"}
    expected = [[11] * 4, [255, 255, 255, 18]]
    assert read_labels(tmp_path / "hie" / "aachen_000000_000019.png").tolist() == expected
    config = Config(root_data_dir=str(tmp_path), train_sample_ids_file="lists/train.txt")
    write_lists(config, "folders", 0, {i: record["source"] for i, record in encoding.files.items()})
    assert read_ids(tmp_path / "lists" / "train.txt") == ["aachen_000000_000019", "bochum_000000_000019"]
    assert read_ids(tmp_path / "val_id.txt") == ["ulm_000000_000019"]


def test_an_ending_belongs_to_the_id_where_a_photo_says_so(tmp_path, tree):
    for name in ("photos", "masks"):
        (tmp_path / name).mkdir()
    for photo, mask in (("a", "a_mask"), ("b_mask", "b_mask"), ("c d", "c d_segmentation")):
        Image.new("RGB", LABELS.shape[::-1]).save(tmp_path / "photos" / f"{photo}.jpg")
        Image.fromarray(LABELS).save(tmp_path / "masks" / f"{mask}.png")
    Encoder(tmp_path / "masks", tmp_path / "photos", tmp_path / "hie", tree).run()
    assert {path.name for path in (tmp_path / "hie").glob("[!.]*.png")} == {"a.png", "b_mask.png", "c d.png"}
