"""Prepares Pascal-Person-Part in the project's layout from the raw annotations of Pascal-Part.

    python tools/prepare_pascal_part.py downloads --out data/pascal_part      # the public archives, unpacked there
    python tools/prepare_pascal_part.py --annotations D --photos D --out data/pascal_part
    python tools/prepare_pascal_part.py --check data/pascal_part              # verify, and draw a contact sheet

Writes JPEGImages, gt_masks, classes.txt, train_id.txt, val_id.txt and dataset.json (what was counted, left out
and at fault). Exit status: 0 all well, 1 some photos at fault (the rest is done), 2 nothing could be done.
Masks need no preparation: tools/dataset_hie_enc.py reads them as they are, in any order that a classes.txt states.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.classes import VOID, read_classes
from utils.cli import map_files, run_main
from utils.encoder import mask_reader
from utils.errors import UserError
from utils.files import read_json, set_aside, write_json, write_whole
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder, draw_split, files_below, id_fault, read_ids, same_form, write_ids
from utils.images import read_labels, read_photo, write_indexed
from utils.masks import MaskReader, find_masks
from utils.pascal_part import LeftOut, import_loadmat, read_annotated
from utils.visualize import legend, overlay, stack, thumbnail

REPO = Path(__file__).resolve().parents[1]
TREE = REPO / "configs" / "hierarchies" / "pascal_part.json"
SPLITS = ("train", "val")
OFFICIAL = {split: REPO / "tools" / "data" / f"pascal_person_part_{split}.txt" for split in SPLITS}
ANNOTATIONS, PHOTOS, MASKS, CLASSES = "Annotations_Part", "JPEGImages", "gt_masks", "classes.txt"
RECORD, MADE_BY = "dataset.json", "tools/prepare_pascal_part.py"
VAL_SHARE = 0.2
SHEET_PHOTOS, SHEET_COLUMNS, SHEET_SIDE = 12, 4, 300

Item = tuple[str, list[Path], Path | str]  # id, its annotations or masks, its photo or why there is none


def main() -> int:
    args = parse_args()
    h = Hierarchy.load(TREE)
    if args.check:
        return check(args.check, args.sheet or args.check / "contact_sheet.jpg", h, args.seed)
    return prepare(args, h)


def prepare(args: argparse.Namespace, h: Hierarchy) -> int:
    """Source -> folder `args.out`; 1 if any photo was at fault."""
    annotations, photos_dir = find_source(args)
    print(f"found annotations in {annotations}\n      photos in {photos_dir}")
    source = {"annotations": str(annotations), "photos": str(photos_dir)}
    source |= {"val_share": args.val_share, "seed": args.seed}
    record = {"made_by": MADE_BY, "complete": False, "tree": h.name, "source": source}
    files: dict[str, list[Path]] = {}
    for path in files_below(annotations, (".mat",)):
        files.setdefault(same_form(path.stem), []).append(path)
    claim_folder(args.out, record, args.overwrite)

    read = partial(read_annotated, id_of_class={name: v for v, name in enumerate(h.names)})
    work = partial(convert, read=read, h=h, out=args.out, copy=args.copy)
    counts, problems, left_out = sorted_out(map_files(work, items_of(files, PhotoFolder(photos_dir)), "prepare"))
    if not counts:
        write_json(record | {"problems": problems, "left_out": Counter(left_out.values())}, args.out / RECORD)
        print_problems(problems)
        raise UserError(f"no photo of {len(files)} could be prepared from {annotations}; see above")

    kind, split = choose_split(set(counts), args.val_share, args.seed)
    left_out |= dict.fromkeys(set(counts).difference(*split.values()), "not in the split")
    write_whole("".join(f"{leaf}: {h.names[leaf]}\n" for leaf in h.leaves), args.out / CLASSES)
    for name, ids in split.items():
        write_ids(ids, args.out / f"{name}_id.txt")
    record |= {
        "complete": True,
        "split": {"kind": kind} | {name: len(ids) for name, ids in split.items()},
        "classes": class_counts(split, counts, h),
        "left_out": Counter(left_out.values()),
        "left_out_ids": sorted(i for i, reason in left_out.items() if reason != "no person"),
        "problems": problems,
    }
    write_json(record, args.out / RECORD)
    print_table(record)
    print(f"wrote {args.out}; look at it with: python {MADE_BY} --check {args.out}")
    return 1 if problems else 0


def find_source(args: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of annotations and photos: under `args.source`, or given one by one.

    Raises: UserError where one is missing or could be several, scipy is missing, or `args.out` holds one.
    """
    for folder in filter(None, (args.source, args.annotations, args.photos)):
        if not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist; unpack the archives and name that folder")
        if args.out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"--out {args.out} holds the source; choose another folder")
    if args.source is None and not (args.annotations and args.photos):
        raise UserError("say where the data is: a SOURCE folder, or --annotations D and --photos D")
    annotations = args.annotations or find_folder(args.source, ANNOTATIONS, "--annotations")
    photos = args.photos or find_folder(args.source, PHOTOS, "--photos")
    if not files_below(annotations, (".mat",)):
        raise UserError(
            f"{annotations} holds no .mat file. Name the folder of raw annotations with --annotations; masks need no "
            "preparation: give them to tools/dataset_hie_enc.py, see docs/data.md"
        )
    import_loadmat()  # before anything is written
    return annotations.resolve(), photos.resolve()


def find_folder(root: Path, name: str, option: str) -> Path:
    """The only folder of that name at or below `root`, those that this tool wrote left out."""
    found = [root] if root.name == name else sorted(root.rglob(name))
    found = [path for path in found if path.is_dir() and not (path.parent / RECORD).exists()]
    if len(found) > 1:
        raise UserError(f"several folders could be meant: {', '.join(map(str, found))}; choose by {option}")
    if not found:
        raise UserError(f"no folder named {name} in {root} or below; give it by {option}")
    return found[0]


# ---- one photo ---------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a photo: pixels per label, or why it is at fault, or why it does not belong."""

    sample_id: str
    counts: np.ndarray | None = None  # (256,) int64
    problem: str | None = None
    left_out: str | None = None


def items_of(files: dict[str, list[Path]], photos: PhotoFolder) -> list[Item]:
    return [(sample_id, paths, photos.find_or_why(sample_id)) for sample_id, paths in files.items()]


def sorted_out(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Counts, problems and reasons to be left out, each by id."""
    fields = Outcome._fields[1:]
    return [{o.sample_id: getattr(o, field) for o in outcomes if getattr(o, field) is not None} for field in fields]


def read_mask(path: Path, reader: MaskReader) -> np.ndarray:
    """The label map of a mask. Shape: (H, W), uint8. Raises: UserError."""
    return reader.read(path)[0]


def convert(
    item: Item, read: Callable[[Path], np.ndarray], h: Hierarchy, out: Path | None = None, copy: bool = False
) -> Outcome:
    """Writes the mask and the photo of one id to `out`, or only looks; a fault is told, so that the rest goes on."""
    sample_id, files, photo = item
    try:
        if fault := id_fault(sample_id):
            raise UserError(f"the name {fault}")
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "nothing"
            raise UserError(f"needs one annotation or mask, there is {names}")
        mask = out and out / MASKS / f"{sample_id}.png"
        is_done = mask and is_newer(mask, files[0])
        labels = read_labels(mask) if is_done else read(files[0])
        counts = checked_counts(photo, labels)
        if out:
            if not is_done:
                write_indexed(mask, labels, h.colours)
            place_photo(photo, out / PHOTOS / (sample_id + photo.suffix.lower()), copy)
        return Outcome(sample_id, counts=counts)
    except LeftOut as reason:
        return Outcome(sample_id, left_out=str(reason))
    except (UserError, OSError) as error:
        return Outcome(sample_id, problem=str(error))


def checked_counts(photo: Path | str, labels: np.ndarray) -> np.ndarray:
    """Pixels of each label; the photo is decoded, so that one that is cut off shows here. Shape: (256,)."""
    if isinstance(photo, str):
        raise UserError(photo)
    size, (height, width) = read_photo(photo).size, labels.shape
    if size != (width, height):
        raise UserError(f"the photo is {size[0]}x{size[1]} but its mask {width}x{height}; they must be equal")
    return np.bincount(labels.ravel(), minlength=256)


def is_newer(made: Path, origin: Path) -> bool:
    """Whether `made` was written after `origin` last changed (or arrived: unpacking keeps old dates)."""
    stat = origin.stat()
    return made.is_file() and made.stat().st_mtime_ns > max(stat.st_mtime_ns, stat.st_ctime_ns)


def place_photo(photo: Path, target: Path, copy: bool) -> None:
    """Hard link, or a copy where one is asked for or links are not possible; appears whole or not at all."""
    photo = photo.resolve()
    if target.exists() and not copy and target.samefile(photo):
        return
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        try:
            (shutil.copy2 if copy else os.link)(photo, part)
        except OSError:  # another disk, or a file system without links
            shutil.copy2(photo, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


# ---- the folder --------------------------------------------------------------------------------------------


def claim_folder(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Makes `out`, completes an earlier run of the same source, or moves what is there aside if told to.

    Raises: UserError where the folder holds anything else.
    """
    ways_out = "choose another --out, or --overwrite to set it aside"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            before = read_record(out)
            old, new = before.get("source") or {}, record["source"]
            changes = [f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in new if old.get(key) != new[key]]
            if overwrite:
                print(f"moved the old {out} to {set_aside(out)[0]}")
            elif before.get("made_by") != MADE_BY:
                raise UserError(f"{out} exists and was not made by this tool; {ways_out}")
            elif changes:
                raise UserError(
                    f"{out} was made from another source or with other options: {', '.join(changes)}; {ways_out}"
                )
        for name in (PHOTOS, MASKS):
            (out / name).mkdir(parents=True, exist_ok=True)
        write_json(record, out / RECORD)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def read_record(folder: Path) -> dict[str, Any]:
    """The folder's dataset.json, or an empty one where there is none that can be read."""
    try:
        record = read_json(folder / RECORD)
    except UserError:
        return {}
    return record if isinstance(record, dict) else {}


def choose_split(present: set[str], val_share: float | None, seed: int) -> tuple[str, dict[str, list[str]]]:
    """The official split where both its parts have photos and no share of val is given, else a drawn one."""
    official = only({name: read_ids(path) for name, path in OFFICIAL.items()}, present)
    if val_share is None and all(official.values()):
        return "official", official
    return f"drawn with seed {seed}", draw_split(present, val_share or VAL_SHARE, seed)


def only(split: dict[str, list[str]], present: set[str]) -> dict[str, list[str]]:
    return {name: [sample_id for sample_id in ids if sample_id in present] for name, ids in split.items()}


# ---- the report --------------------------------------------------------------------------------------------


def class_counts(split: dict[str, list[str]], counts: dict[str, np.ndarray], h: Hierarchy) -> list[dict[str, Any]]:
    """Pixels and photos of each class in each split; classes above the leaves, and void, only where they occur."""
    tables = {name: np.stack([np.zeros(256, int), *(counts[i] for i in ids)]) for name, ids in split.items()}
    rows = []
    for label in [*range(h.num_nodes), h.ignore_index]:
        row: dict[str, Any] = {"id": label, "name": VOID if label == h.ignore_index else h.names[label]}
        for name, table in tables.items():
            row |= {f"{name}_pixels": int(table[:, label].sum()), f"{name}_photos": int((table[:, label] > 0).sum())}
        if label in h.leaves or any(row[f"{name}_photos"] for name in split):
            rows.append(row)
    return rows


def print_table(record: dict[str, Any]) -> None:
    rows, split = record["classes"], record["split"]
    sums = {name: max(1, sum(row[f"{name}_pixels"] for row in rows)) for name in SPLITS}
    print(f"\nsplit ({split['kind']}): {split['train']:,} train + {split['val']:,} val photos")
    print(f"{'':12}{'% of pixels':>20}{'photos with it':>22}")
    print(f"{'class':12}{'train':>10}{'val':>10}{'train':>12}{'val':>10}")
    for row in rows:
        shares = "".join(f"{100 * row[f'{name}_pixels'] / sums[name]:10.2f}" for name in SPLITS)
        print(f"{row['name']:12}{shares}{row['train_photos']:12,}{row['val_photos']:10,}")
    for reason, number in record.get("left_out", {}).items():
        print(f"left out: {number:,} photos, {reason}")
    print_problems(record["problems"])


def print_problems(problems: dict[str, str]) -> None:
    print(f"at fault: {len(problems) or 'none'}")
    for sample_id, problem in problems.items():
        print(f"  {sample_id}: {problem}")


# ---- --check -----------------------------------------------------------------------------------------------


def check(folder: Path, sheet: Path, h: Hierarchy, seed: int) -> int:
    """Verifies a prepared folder and draws its contact sheet; 1 if anything is at fault."""
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; prepare it first, see --help")
    faults = []
    if read_record(folder).get("complete") is False:
        faults.append(f"{RECORD} says the preparation did not finish; run it again, it completes the folder")
    split = {name: read_ids(folder / f"{name}_id.txt") for name in SPLITS}
    if both := sorted(set(split["train"]) & set(split["val"])):
        faults.append(f"{len(both)} ids are in both train and val: {', '.join(both[:5])}")
    ids, photos = dict.fromkeys(split["train"] + split["val"]), PhotoFolder(folder / PHOTOS)
    files = find_masks(folder / MASKS, photos)
    reader = mask_reader(h, read_classes(folder / CLASSES, h.names), by="auto")
    items = items_of({sample_id: files.get(sample_id, []) for sample_id in ids}, photos)
    work = partial(convert, read=partial(read_mask, reader=reader), h=h)
    counts, problems, _ = sorted_out(map_files(work, items, "check"))

    is_official = all(set(split[name]) == set(read_ids(OFFICIAL[name])) for name in SPLITS)
    record = {"split": {"kind": "official" if is_official else "not the official one"}}
    record["split"] |= {name: len(listed) for name, listed in split.items()}
    print_table(record | {"classes": class_counts(only(split, set(counts)), counts, h), "problems": problems})
    for name, there in ((MASKS, files), (PHOTOS, photos.paths)):  # not wrong, but worth knowing
        if extra := sorted(there.keys() - ids.keys()):
            print(f"note: {len(extra)} files in {name} are in no id list, such as that of {extra[0]}")
    for fault in faults:
        print(f"fault: {fault}")
    if counts:
        chosen = random.Random(seed).sample(sorted(counts), min(SHEET_PHOTOS, len(counts)))
        draw_sheet({i: (photos.find(i), reader.read(files[i][0])[0]) for i in chosen}, sheet, h)
        print(f"drew {sheet}; look at it: are heads heads, and arms arms?")
    return 1 if faults or problems else 0


def draw_sheet(chosen: dict[str, tuple[Path, np.ndarray]], path: Path, h: Hierarchy) -> None:
    """A grid of photos with their masks over them, and the colour of each class below."""
    width, height = SHEET_SIDE + 8, SHEET_SIDE + 28
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, -(-len(chosen) // SHEET_COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for position, (sample_id, (photo, labels)) in enumerate(chosen.items()):
        row, column = divmod(position, SHEET_COLUMNS)
        picture = thumbnail(overlay(np.asarray(read_photo(photo)), labels, h), SHEET_SIDE)
        sheet.paste(Image.fromarray(picture), (column * width + 4, row * height + 24))
        draw.text((column * width + 4, row * height + 4), sample_id, "black", font)
    try:
        Image.fromarray(stack([np.array(sheet), legend(h, sheet.width, h.leaves)])).save(path, quality=88)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the contact sheet {path}: {error}; choose a .jpg or .png by --sheet") from error


# ---- the command line --------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", nargs="?", type=Path, help=f"folder with {ANNOTATIONS} and {PHOTOS} below it")
    add("--out", type=Path, help="folder to write, e.g. data/pascal_part")
    add("--annotations", type=Path, help="the folder of the .mat files, where it is not found")
    add("--photos", type=Path, help="the folder of the photos, where it is not found")
    add("--val-share", type=float, metavar="S", help="draw a split with this share of val, e.g. 0.2, in place of the "
        f"official one (where that has no photos here: {VAL_SHARE})")  # fmt: skip
    add("--seed", type=int, default=0, help="of a drawn split, and of the contact sheet's choice (default 0)")
    add("--copy", action="store_true", help="copy photos; default: hard links, which take no space")
    add("--overwrite", action="store_true", help="set what is in --out aside, as <out>.old-<time>")
    add("--check", type=Path, metavar="FOLDER", help="only verify a prepared folder and draw a contact sheet")
    add("--sheet", type=Path, metavar="FILE", help="with --check: the sheet (default FOLDER/contact_sheet.jpg)")
    args = parser.parse_args()
    if args.check and (args.source or args.out):
        parser.error("--check FOLDER goes alone: it prepares nothing")
    if not args.check and not args.out:
        parser.error("say where to write, e.g. --out data/pascal_part")
    if args.val_share is not None and not 0 < args.val_share < 1:
        parser.error(f"--val-share is {args.val_share}; it is a share between 0 and 1, e.g. 0.2")
    return args


if __name__ == "__main__":
    run_main(main)
