"""Prepares Pascal-Person-Part in the project's layout from the raw annotations of Pascal-Part.

    python tools/prepare_pascal_part.py downloads --out data/pascal_part      # the public archives, unpacked there

Writes JPEGImages, gt_masks, classes.txt, train_id.txt and val_id.txt (the official split) and dataset.json (what was
left out and at fault). The folder is there whole or not at all.
Exit status: 0 all well, 1 some photos at fault (the rest is done), 2 nothing could be done.
Masks need no preparation: tools/dataset_hie_enc.py reads them as they are, in any order that a classes.txt states.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import importlib.util
import shutil
from collections import Counter
from typing import Any

import numpy as np

from utils.cli import map_files, run_main
from utils.errors import UserError
from utils.files import whole_folder, write_json, write_whole
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder, read_ids, write_ids
from utils.images import read_photo, write_indexed

REPO = Path(__file__).resolve().parents[1]
TREE = REPO / "configs" / "hierarchies" / "pascal_part.json"
OFFICIAL = {split: REPO / "tools" / "data" / f"pascal_person_part_{split}.txt" for split in ("train", "val")}
ANNOTATIONS, PHOTOS, MASKS, RECORD = "Annotations_Part", "JPEGImages", "gt_masks", "dataset.json"
LEFT_OUT = NO_PERSON, NO_PART = "no person", "a person, but no visible part"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=f"folder with {ANNOTATIONS} and {PHOTOS} below it")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write, e.g. data/pascal_part")
    args = parser.parse_args()
    if importlib.util.find_spec("scipy") is None:
        raise UserError("scipy reads the raw annotations; install it with: pip install -r requirements-tools.txt")
    with whole_folder(args.out) as folder:
        record = prepare(find_folder(args.source, ANNOTATIONS), PhotoFolder(find_folder(args.source, PHOTOS)), folder)
    for reason, number in record["left_out"].items():
        print(f"left out: {number:,} photos, {reason}")
    for sample_id, problem in record["problems"].items():
        print(f"at fault: {sample_id}: {problem}")
    print(f"wrote {args.out}: " + ", ".join(f"{number:,} {name} photos" for name, number in record["split"].items()))
    return 1 if record["problems"] else 0


def find_folder(root: Path, name: str) -> Path:
    """The only folder of that name below `root`, those that this tool wrote left out. Raises: UserError."""
    found = [str(path) for path in root.resolve().rglob(name) if not (path.parent / RECORD).exists()]
    if len(found) != 1:
        raise UserError(
            f"looked for one folder {name} below {root}, found {', '.join(sorted(found)) or 'none'}. Unpack the "
            "archives, and name the folder that holds them (masks need no preparation: see docs/data.md)"
        )
    return Path(found[0])


def prepare(annotations: Path, photos: PhotoFolder, folder: Path) -> dict[str, Any]:
    """Fills a folder; returns what dataset.json holds. Raises: UserError where not one photo could be prepared."""
    h = Hierarchy.load(TREE)
    for name in (PHOTOS, MASKS):
        (folder / name).mkdir()
    paths = sorted(annotations.glob("*.mat"))
    outcomes = map_files(lambda path: convert(path, photos, folder, h), paths, "prepare")
    of_id = dict(zip([path.stem for path in paths], outcomes, strict=True))
    done = {sample_id for sample_id, outcome in of_id.items() if outcome is None}
    problems = {sample_id: outcome for sample_id, outcome in of_id.items() if outcome not in (None, *LEFT_OUT)}
    if not done:
        told = "".join(f"\n  {sample_id}: {problem}" for sample_id, problem in problems.items())
        raise UserError(f"none of the {len(paths)} annotations in {annotations} could be prepared{told}")

    split = {name: [i for i in read_ids(path) if i in done] for name, path in OFFICIAL.items()}
    for name, ids in split.items():
        if ids:
            write_ids(ids, folder / f"{name}_id.txt")
    write_whole("".join(f"{leaf}: {h.names[leaf]}\n" for leaf in h.leaves), folder / "classes.txt")
    record = {
        "source": {"annotations": str(annotations), "photos": str(photos.folder)},
        "split": {name: len(ids) for name, ids in split.items()},
        "left_out": Counter(outcome for outcome in outcomes if outcome in LEFT_OUT),
        "problems": problems,
    }
    write_json(record, folder / RECORD)
    return record


# ---- one photo ---------------------------------------------------------------------------------------------


def convert(annotation: Path, photos: PhotoFolder, folder: Path, h: Hierarchy) -> str | None:
    """Writes mask and photo of an annotation; or says why it is left out or at fault, so that the rest goes on."""
    try:
        things = read_things(annotation)
        if not any(is_person for is_person, _ in things):
            return NO_PERSON
        photo = photos.find(annotation.stem)
        labels = painted(things, read_photo(photo).size, {name: v for v, name in enumerate(h.names)})
        if not labels.any():
            return NO_PART
        write_indexed(folder / MASKS / f"{annotation.stem}.png", labels, h.colours)
        shutil.copy2(photo, folder / PHOTOS / (annotation.stem + photo.suffix.lower()))
        return None
    except (UserError, OSError) as error:
        return str(error)


def read_things(path: Path) -> list[tuple[bool, list[tuple[str, np.ndarray]]]]:
    """Of each object of an annotation whether it is a person, and the names and masks of its parts, in order.

    Raises: UserError for a damaged file, or one that is not as Pascal-Part has them.
    """
    from scipy.io import loadmat  # nothing else needs it

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


if __name__ == "__main__":
    run_main(main)
