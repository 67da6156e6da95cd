"""Prepares Pascal-Person-Part in the project's layout from the raw annotations of Pascal-Part.

    python tools/prepare_pascal_part.py downloads --out data/pascal_part      # the public archives, unpacked there

Writes JPEGImages, gt_masks, classes.txt, train_id.txt and val_id.txt (the official split), dataset.json (what was
counted, left out and at fault) and contact_sheet.jpg, to be looked at. The folder is there whole or not at all.
Exit status: 0 all well, 1 some photos at fault (the rest is done), 2 nothing could be done.
Masks need no preparation: tools/dataset_hie_enc.py reads them as they are, in any order that a classes.txt states.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import os
import random
import shutil
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

try:
    from scipy.io import loadmat
except ImportError:  # nothing else needs it
    loadmat = None

from utils.cli import map_files, run_main
from utils.errors import UserError
from utils.files import set_aside, whole_folder, write_json, write_whole
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder, read_ids, write_ids
from utils.images import read_labels, read_photo, write_indexed
from utils.visualize import legend, overlay, stack, thumbnail

REPO = Path(__file__).resolve().parents[1]
TREE = REPO / "configs" / "hierarchies" / "pascal_part.json"
OFFICIAL = {split: REPO / "tools" / "data" / f"pascal_person_part_{split}.txt" for split in ("train", "val")}
ANNOTATIONS, PHOTOS, MASKS = "Annotations_Part", "JPEGImages", "gt_masks"
RECORD, SHEET = "dataset.json", "contact_sheet.jpg"
SHEET_PHOTOS, SHEET_COLUMNS, SHEET_SIDE = 12, 4, 300
PARTS_OF_CLASS = {  # the neck belongs to the head in this data set
    "head": "head leye reye lear rear lebrow rebrow nose mouth hair neck",
    "torso": "torso",
    "up_hand": "luarm ruarm",
    "low_hand": "llarm rlarm lhand rhand",
    "up_leg": "luleg ruleg",
    "low_leg": "llleg rlleg lfoot rfoot",
}
CLASS_OF_PART = {part: name for name, parts in PARTS_OF_CLASS.items() for part in parts.split()}


def main() -> int:
    """Source -> folder; 1 if any photo was at fault."""
    args = parse_args()
    if loadmat is None:
        raise UserError("scipy reads the raw annotations; install it with: pip install -r requirements-tools.txt")
    if args.out.resolve() in (args.source.resolve(), *args.source.resolve().parents):
        raise UserError(f"--out {args.out} holds the source; choose another folder")
    annotations, photos_dir = find_folder(args.source, ANNOTATIONS), find_folder(args.source, PHOTOS)
    print(f"found annotations in {annotations}\n      photos in {photos_dir}")
    try:
        if args.out.exists() and any(args.out.iterdir()):
            if not args.overwrite:
                raise UserError(f"{args.out} is not empty; choose another --out, or --overwrite to set it aside")
            print(f"moved the old {args.out} to {set_aside(args.out)[0]}")
        with whole_folder(args.out) as folder:
            record = prepare(annotations, PhotoFolder(photos_dir), folder, args.copy)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}; choose another --out") from error
    print_table(record)
    print(f"wrote {args.out}; look at {args.out / SHEET}: are heads heads, and arms arms?")
    return 1 if record["problems"] else 0


def find_folder(root: Path, name: str) -> Path:
    """The only folder of that name at or below `root`, those that this tool wrote left out. Raises: UserError."""
    found = [root] if root.name == name else sorted(root.rglob(name))
    ours = {path.parent for path in found if (path.parent / RECORD).exists() or path.parent.name.startswith(".")}
    found = [path.resolve() for path in found if path.is_dir() and path.parent not in ours]
    if len(found) != 1:
        what = f"several folders could be meant: {', '.join(map(str, found))}" if found else "none is there"
        raise UserError(
            f"looked for one folder {name} in {root} or below, {what}. Unpack the archives, and name the folder that "
            "holds what they hold (masks need no preparation: see docs/data.md)"
        )
    return found[0]


def prepare(annotations: Path, photos: PhotoFolder, folder: Path, copy: bool) -> dict[str, Any]:
    """Fills a folder; returns what dataset.json holds. Raises: UserError where not one photo could be prepared."""
    h = Hierarchy.load(TREE)
    for name in (PHOTOS, MASKS):
        (folder / name).mkdir()
    items = [(path, photos.find(path.stem)) for path in sorted(annotations.glob("*.mat"))]
    outcomes = map_files(partial(convert, h=h, folder=folder, copy=copy), items, "prepare")
    counts = {o.sample_id: o.counts for o in outcomes if o.counts is not None}
    problems = {o.sample_id: o.problem for o in outcomes if o.problem}
    left_out = Counter(o.left_out for o in outcomes if o.left_out)
    if not counts:
        told = "".join(f"\n  {sample_id}: {problem}" for sample_id, problem in problems.items())
        raise UserError(f"none of the {len(items)} annotations in {annotations} could be prepared{told}")

    split = {name: [i for i in read_ids(path) if i in counts] for name, path in OFFICIAL.items()}
    if all(split.values()):
        left_out["in no official list"] = len(counts) - sum(map(len, split.values()))
        for name, ids in split.items():
            write_ids(ids, folder / f"{name}_id.txt")
    else:
        split = {"all": sorted(counts)}
    write_whole("".join(f"{leaf}: {h.names[leaf]}\n" for leaf in h.leaves), folder / "classes.txt")
    draw_sheet(random.Random(0).sample(sorted(counts), min(SHEET_PHOTOS, len(counts))), photos, folder, h)
    record = {
        "source": {"annotations": str(annotations), "photos": str(photos.folder)},
        "split": {name: len(ids) for name, ids in split.items()},
        "classes": [class_shares(leaf, split, counts, h) for leaf in h.leaves],
        "left_out": +left_out,
        "problems": problems,
    }
    write_json(record, folder / RECORD)
    return record


# ---- one photo ---------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a photo: pixels per label (256,), or why it is at fault, or why it does not belong."""

    sample_id: str
    counts: np.ndarray | None = None
    problem: str | None = None
    left_out: str | None = None


def convert(item: tuple[Path, Path | str], h: Hierarchy, folder: Path, copy: bool) -> Outcome:
    """Writes the mask and the photo of one annotation; a fault is told, so that the rest goes on."""
    annotation, photo = item
    sample_id = annotation.stem
    try:
        things = read_things(annotation)
        if not any(is_person for is_person, _ in things):
            return Outcome(sample_id, left_out="no person")
        if isinstance(photo, str):
            raise UserError(photo)
        labels = painted(things, read_photo(photo).size, {name: v for v, name in enumerate(h.names)})
        if not labels.any():
            return Outcome(sample_id, left_out="a person, but no visible part")
        write_indexed(folder / MASKS / f"{sample_id}.png", labels, h.colours)
        place_photo(photo.resolve(), folder / PHOTOS / (sample_id + photo.suffix.lower()), copy)
        return Outcome(sample_id, counts=np.bincount(labels.ravel(), minlength=256))
    except (UserError, OSError) as error:
        return Outcome(sample_id, problem=str(error))


def read_things(path: Path) -> list[tuple[bool, list[tuple[str, np.ndarray]]]]:
    """Of each object of an annotation whether it is a person, and the names and masks of its parts, in order.

    Raises: UserError for a damaged file, or one that is not as Pascal-Part has them.
    """
    try:
        anno = loadmat(path, struct_as_record=False, squeeze_me=True, variable_names=["anno"])["anno"]
        # loadmat squeezes: one struct stands alone, none is an empty array, several are an array
        return [
            (thing.__dict__["class"] == "person", [(str(p.part_name), p.mask) for p in np.atleast_1d(thing.parts)])
            for thing in np.atleast_1d(anno.objects)
        ]
    except Exception as error:  # scipy raises nearly every type on damaged files
        raise UserError(f"the annotation {path} cannot be read, or is none of Pascal-Part: {error}") from error


def painted(things: list, size: tuple[int, int], id_of_class: dict[str, int]) -> np.ndarray:
    """The label map: each part, in order, paints over what is there; a person's its class, any other's background.

    Whole-object masks are not used.

    Shape: (H, W), uint8.
    Raises: UserError for an unknown part of a person, and part masks of another size than the photo.
    """
    labels = np.zeros(size[::-1], np.uint8)
    for is_person, parts in things:
        for name, mask in parts:
            if is_person and name not in CLASS_OF_PART:
                raise UserError(f"unknown part {name!r} of a person; known parts: {', '.join(CLASS_OF_PART)}")
            if np.shape(mask) != labels.shape:
                there = "x".join(map(str, np.shape(mask)[::-1]))
                raise UserError(f"the mask of part {name!r} is {there}, the photo {size[0]}x{size[1]}")
            labels[mask != 0] = id_of_class[CLASS_OF_PART[name]] if is_person else 0
    return labels


def place_photo(photo: Path, target: Path, copy: bool) -> None:
    """Hard link, or a copy where one is asked for, or the file system knows no links."""
    if not copy:
        with contextlib.suppress(OSError):
            return os.link(photo, target)
    shutil.copy2(photo, target)
    return None


# ---- the report --------------------------------------------------------------------------------------------


def class_shares(leaf: int, split: dict[str, list[str]], counts: dict[str, np.ndarray], h: Hierarchy) -> dict[str, Any]:
    """The share of a class of the pixels of each part of the split, and the photos with it."""
    row: dict[str, Any] = {"id": leaf, "name": h.names[leaf]}
    for name, ids in split.items():
        table = np.stack([counts[i] for i in ids])
        row[f"{name}_percent"] = round(100 * table[:, leaf].sum() / table.sum(), 2)
        row[f"{name}_photos"] = int((table[:, leaf] > 0).sum())
    return row


def print_table(record: dict[str, Any]) -> None:
    split = record["split"]
    print("\n" + ", ".join(f"{name}: {number:,} photos" for name, number in split.items()))
    print(f"{'class':<10}" + "".join(f"{name + ' %':>10}{'photos':>8}" for name in split))
    for row in record["classes"]:
        cells = (f"{row[f'{name}_percent']:>10.2f}{row[f'{name}_photos']:>8,}" for name in split)
        print(f"{row['name']:<10}" + "".join(cells))
    if "all" in split:
        print("not the photos of the official lists: draw your own with tools/dataset_hie_enc.py --split 0.2")
    for reason, number in record["left_out"].items():
        print(f"left out: {number:,} photos, {reason}")
    print(f"at fault: {len(record['problems']) or 'none'}")
    for sample_id, problem in record["problems"].items():
        print(f"  {sample_id}: {problem}")


def draw_sheet(ids: list[str], photos: PhotoFolder, folder: Path, h: Hierarchy) -> None:
    """A grid of photos with their masks over them, and the colour of each class below."""
    width, height = SHEET_SIDE + 8, SHEET_SIDE + 28
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, -(-len(ids) // SHEET_COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for position, sample_id in enumerate(ids):
        row, column = divmod(position, SHEET_COLUMNS)
        photo, labels = read_photo(photos.find(sample_id)), read_labels(folder / MASKS / f"{sample_id}.png")
        picture = thumbnail(overlay(np.asarray(photo), labels, h), SHEET_SIDE)
        sheet.paste(Image.fromarray(picture), (column * width + 4, row * height + 24))
        draw.text((column * width + 4, row * height + 4), sample_id, "black", font)
    Image.fromarray(stack([np.array(sheet), legend(h, sheet.width, h.leaves)])).save(folder / SHEET, quality=88)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", type=Path, help=f"folder with {ANNOTATIONS} and {PHOTOS} below it")
    add("--out", type=Path, required=True, help="folder to write, e.g. data/pascal_part")
    add("--copy", action="store_true", help="copy photos; default: hard links, which take no space")
    add("--overwrite", action="store_true", help="set what is in --out aside, as <out>.old-<time>")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
