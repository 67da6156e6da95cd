"""Prepares Pascal-Person-Part in the project's layout, from whichever form of it you hold.

    python tools/prepare_pascal_part.py downloads --out data/pascal_part      # the public archives, unpacked there
    python tools/prepare_pascal_part.py pngs --order standard --out data/pascal_part
    python tools/prepare_pascal_part.py --annotations D --photos D --out data/pascal_part
    python tools/prepare_pascal_part.py --check data/pascal_part              # verify, and draw a contact sheet

Writes JPEGImages, gt_masks, classes.txt, train_id.txt, val_id.txt and dataset.json (what was counted, left out
and at fault). Exit status: 0 all well, 1 some photos at fault (the rest is done), 2 nothing could be done.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.cli import map_files, run_main
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import id_fault, read_ids
from utils.images import PHOTO_SUFFIXES, read_labels, read_photo, write_indexed
from utils.pascal_part import (
    FORMATS,
    MASK_FOLDERS,
    PHOTO_FOLDER,
    RAW_FOLDER,
    LeftOut,
    Request,
    Source,
    find_source,
    read_classes,
    without_void,
)

TREE = Path(__file__).resolve().parents[1] / "configs" / "hierarchies" / "pascal_part.json"
OFFICIAL = {
    split: Path(__file__).resolve().parent / "data" / f"pascal_person_part_{split}.txt" for split in ("train", "val")
}
SPLITS = ("train", "val")
RECORD = "dataset.json"
MADE_BY = "tools/prepare_pascal_part.py"
SHEET_PHOTOS, SHEET_COLUMNS, SHEET_CELL = 12, 4, (320, 280)


def main() -> int:
    args = parse_args()
    h = Hierarchy.load(TREE)
    if args.check:
        return check(args.check, args.sheet or args.check / "contact_sheet.jpg", h, args.seed, args.workers)
    return prepare(args, h)


def prepare(args: argparse.Namespace, h: Hierarchy) -> int:
    """Source -> folder `args.out`; 1 if any photo was at fault."""
    request = Request(args.source, args.annotations, args.photos, args.format, args.order, args.out)
    source = find_source(request, h)
    print(f"found {source.format} annotations in {source.annotations}\n      photos in {source.photos}")
    record = {"made_by": MADE_BY, "complete": False, "tree": h.name, "source": describe(source, args)}
    claim_folder(args.out, record, source, args.overwrite)

    files = source.files()
    work = partial(convert, source=source, out=args.out, h=h, copy=args.copy)
    outcomes = map_files(work, list(files.items()), "prepare", args.workers)
    good = [outcome.sample_id for outcome in outcomes if outcome.counts is not None]
    problems = {outcome.sample_id: outcome.problem for outcome in outcomes if outcome.problem}
    left_out = {outcome.sample_id: outcome.left_out for outcome in outcomes if outcome.left_out}
    if not good:
        write_record(args.out, record | {"problems": problems, "left_out": Counter(left_out.values())})
        print_problems(problems)
        raise UserError(f"no photo of {len(files)} could be prepared from {source.annotations}; see above")

    kind, split = choose_split(good, source, args)
    for sample_id in set(good).difference(*split.values()):
        left_out[sample_id] = "not in the split"
    write_atomically(args.out / "classes.txt", class_list(h))
    for name, ids in split.items():
        write_atomically(args.out / f"{name}_id.txt", "".join(f"{sample_id}\n" for sample_id in ids))
    counts = {outcome.sample_id: outcome.counts for outcome in outcomes if outcome.counts is not None}
    record |= {
        "complete": True,
        "split": {"kind": kind} | {name: len(ids) for name, ids in split.items()},
        "classes": class_counts(split, counts, h),
        "left_out": Counter(left_out.values()),
        "left_out_ids": sorted(i for i, reason in left_out.items() if reason != "no person"),
        "problems": problems,
    }
    write_record(args.out, record)
    print_table(record)
    print(f"wrote {args.out}; look at it with: python {MADE_BY} --check {args.out}")
    return 1 if problems else 0


# ---- one photo ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a photo: pixels per label, or why it is at fault, or why it does not belong."""

    sample_id: str
    counts: np.ndarray | None = None  # (256,) int64
    problem: str | None = None
    left_out: str | None = None


def convert(item: tuple[str, list[Path]], source: Source, out: Path, h: Hierarchy, copy: bool) -> Outcome:
    """Writes the mask and the photo of one id; a fault is told in the outcome, so that the rest goes on."""
    sample_id, files = item
    try:
        if fault := id_fault(sample_id):
            raise UserError(f"the name {fault}")
        if len(files) > 1:
            raise UserError(f"has {len(files)} annotations, {', '.join(f.name for f in files)}; keep one")
        mask = out / "gt_masks" / f"{sample_id}.png"
        is_done = is_newer(mask, files[0])
        labels = read_labels(mask) if is_done else source.read(files[0], h)
        photo = find_file(source.photos, sample_id, PHOTO_SUFFIXES)
        check_size(read_photo(photo).size, labels)  # decodes: a photo that is cut off shows here
        if not is_done:
            write_indexed(mask, labels, h.colours)
        place_photo(photo, out / PHOTO_FOLDER / (sample_id + photo.suffix.lower()), copy)
        return Outcome(sample_id, counts=count(labels))
    except LeftOut as reason:
        return Outcome(sample_id, left_out=str(reason))
    except (UserError, OSError) as error:
        return Outcome(sample_id, problem=str(error))


def check_size(photo: tuple[int, int], labels: np.ndarray) -> None:
    height, width = labels.shape
    if photo != (width, height):
        raise UserError(f"the photo is {photo[0]}x{photo[1]} but its mask {width}x{height}; they must be equal")


def find_file(folder: Path, sample_id: str, suffixes: tuple[str, ...]) -> Path:
    for suffix in suffixes:
        for name in (sample_id + suffix, sample_id + suffix.upper()):
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"no file for id '{sample_id}' in {folder}; looked for {', '.join(suffixes)}")


def count(labels: np.ndarray) -> np.ndarray:
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
    part = target.with_name(f".{target.name}.{os.getpid()}.partial")
    part.unlink(missing_ok=True)
    try:
        if copy:
            shutil.copy2(photo, part)
        else:
            link_or_copy(photo, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def link_or_copy(photo: Path, target: Path) -> None:
    try:
        os.link(photo, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(photo, target)


# ---- the folder --------------------------------------------------------------------------------------------


def describe(source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for a second run to complete the first."""
    return {
        "format": source.format,
        "annotations": str(source.annotations),
        "photos": str(source.photos),
        "labels": {str(label): name for label, name in (source.order or {}).items()},
        "split": args.split,
        "val_share": args.val_share,
        "seed": args.seed,
    }


def claim_folder(out: Path, record: dict[str, Any], source: Source, overwrite: bool) -> None:
    """Makes `out`, completes an earlier run of the same source, or moves what is there aside if told to.

    Raises: UserError where the folder holds anything else.
    """
    for folder in (source.annotations, source.photos):
        if folder == out.resolve() or out.resolve() in folder.parents:
            raise UserError(f"--out {out} holds the source {folder}; choose another folder")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            made_before = read_record(out)
            if overwrite:
                print(f"moved the old {out} to {move_aside(out)}")
            elif made_before.get("made_by") != MADE_BY:
                raise UserError(
                    f"{out} exists and was not made by this tool; choose another --out, or --overwrite to move it aside"
                )
            elif made_before.get("source") != record["source"]:
                raise UserError(
                    f"{out} was made from another source or with other options: "
                    f"{differences(made_before.get('source'), record['source'])}; choose another --out, or --overwrite "
                    "to move it aside"
                )
        for name in (PHOTO_FOLDER, "gt_masks"):
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    write_record(out, record)


def move_aside(out: Path) -> Path:
    number = 1
    while (aside := out.with_name(f"{out.name}.old{number}")).exists():
        number += 1
    out.rename(aside)
    return aside


def differences(old: Any, new: dict[str, Any]) -> str:
    old = old if isinstance(old, dict) else {}
    return ", ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in new if old.get(key) != new[key])


def read_record(folder: Path) -> dict[str, Any]:
    """The folder's dataset.json, or an empty one where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def class_list(h: Hierarchy) -> str:
    return "".join(f"{leaf}: {h.names[leaf]}\n" for leaf in h.leaves)


# ---- the split ---------------------------------------------------------------------------------------------


def choose_split(ids: list[str], source: Source, args: argparse.Namespace) -> tuple[str, dict[str, list[str]]]:
    """The official split if the ids are those, else the source's own lists if they cover the ids, else a drawn one."""
    official = {name: read_ids(path) for name, path in OFFICIAL.items()}
    wanted, present = set().union(*official.values()), set(ids)
    if args.split == "official" or (args.split == "auto" and (present <= wanted or wanted <= present)):
        split = only(official, present)
        if all(split.values()):
            return "official", split
        if args.split == "official":
            raise UserError("--split official, but the photos have no id of its train or val list; use --split own")
    if args.split == "auto" and (split := source_lists(source)) and present <= set().union(*split.values()):
        return "from the source", only(split, present)
    if len(ids) < 2:
        raise UserError(f"only one photo ({ids[0]}) could be prepared; a train and a val split need two")
    shuffled = random.Random(args.seed).sample(sorted(ids), len(ids))
    n_val = min(max(1, round(len(ids) * args.val_share)), len(ids) - 1)
    return f"drawn with seed {args.seed}", {"train": sorted(shuffled[n_val:]), "val": sorted(shuffled[:n_val])}


def source_lists(source: Source) -> dict[str, list[str]] | None:
    """The id lists beside the source's masks, if it has both."""
    paths = {name: source.annotations.parent / f"{name}_id.txt" for name in SPLITS}
    if not all(path.is_file() for path in paths.values()):
        return None
    return {name: read_ids(path) for name, path in paths.items()}


def only(split: dict[str, list[str]], present: set[str]) -> dict[str, list[str]]:
    return {name: [sample_id for sample_id in ids if sample_id in present] for name, ids in split.items()}


# ---- the report --------------------------------------------------------------------------------------------


def class_counts(split: dict[str, list[str]], counts: dict[str, np.ndarray], h: Hierarchy) -> list[dict[str, Any]]:
    """Pixels and photos of each class in each split; classes above the leaves, and void, only where they occur."""
    rows = []
    total = {name: np.sum([counts[i] for i in ids], axis=0, initial=0) for name, ids in split.items()}
    for label in [*range(h.num_nodes), h.ignore_index]:
        row: dict[str, Any] = {"id": label, "name": "void" if label == h.ignore_index else h.names[label]}
        for name, ids in split.items():
            row[f"{name}_pixels"] = int(np.broadcast_to(total[name], 256)[label])
            row[f"{name}_photos"] = sum(bool(counts[i][label]) for i in ids)
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
    print_problems(record.get("problems", {}))


def print_problems(problems: dict[str, str]) -> None:
    print(f"at fault: {len(problems) or 'none'}")
    for sample_id, problem in problems.items():
        print(f"  {sample_id}: {problem}")


# ---- --check -----------------------------------------------------------------------------------------------


def check(folder: Path, sheet: Path, h: Hierarchy, seed: int, workers: int) -> int:
    """Verifies a prepared folder and draws its contact sheet; 1 if anything is at fault."""
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; prepare it first, see --help")
    faults = folder_faults(folder, h)
    split = {name: read_ids(folder / f"{name}_id.txt") for name in SPLITS}
    ids = list(dict.fromkeys(split["train"] + split["val"]))
    outcomes = map_files(partial(check_sample, folder=folder, h=h), ids, "check", workers)
    counts = {outcome.sample_id: outcome.counts for outcome in outcomes if outcome.counts is not None}
    problems = {outcome.sample_id: outcome.problem for outcome in outcomes if outcome.problem}
    if both := sorted(set(split["train"]) & set(split["val"])):
        faults.append(f"{len(both)} ids are in both train and val: {', '.join(both[:5])}")

    good = only(split, set(counts))
    kind = "official" if split_is_official(split) else "not the official one"
    print_table(
        {
            "split": {"kind": kind} | {name: len(ids) for name, ids in split.items()},
            "classes": class_counts(good, counts, h),
            "problems": problems,
        }
    )
    for note in strangers(folder, set(ids)):
        print(f"note: {note}")
    for fault in faults:
        print(f"fault: {fault}")
    if counts:
        chosen = random.Random(seed).sample(sorted(counts), min(SHEET_PHOTOS, len(counts)))
        save_sheet(draw_sheet(folder, chosen, h), sheet)
        print(f"drew {sheet}; look at it: are heads heads, and arms arms?")
    return 1 if faults or problems else 0


def folder_faults(folder: Path, h: Hierarchy) -> list[str]:
    """What is wrong with the folder as a whole."""
    faults = []
    try:
        order = without_void(read_classes(folder / "classes.txt", h.names))
        known = dict(enumerate(h.names))
        wrong = [f"{v} is {name}, in the tree {known.get(v)}" for v, name in order.items() if known.get(v) != name]
        if wrong:
            faults.append(f"classes.txt is not in the tree's order: {'; '.join(wrong)}; prepare the folder again")
    except UserError as error:
        faults.append(str(error))
    if read_record(folder).get("complete") is False:
        faults.append(f"{RECORD} says the preparation did not finish; run it again, it completes the folder")
    return faults


def check_sample(sample_id: str, folder: Path, h: Hierarchy) -> Outcome:
    try:
        photo = find_file(folder / PHOTO_FOLDER, sample_id, PHOTO_SUFFIXES)
        labels = read_labels(find_file(folder / "gt_masks", sample_id, (".png", ".npy")))
        check_size(read_photo(photo).size, labels)
        counts = count(labels)
        if unknown := [int(v) for v in np.flatnonzero(counts) if v >= h.num_nodes and v != h.ignore_index]:
            raise UserError(f"the mask has labels {unknown}, which the tree '{h.name}' does not know")
        return Outcome(sample_id, counts=counts)
    except (UserError, OSError) as error:
        return Outcome(sample_id, problem=str(error))


def split_is_official(split: dict[str, list[str]]) -> bool:
    return all(set(split[name]) == set(read_ids(OFFICIAL[name])) for name in SPLITS)


def strangers(folder: Path, ids: set[str]) -> list[str]:
    """Files that no id list names: not wrong, but worth knowing."""
    notes = []
    for name in (PHOTO_FOLDER, "gt_masks"):
        if (folder / name).is_dir():
            extra = sorted(p.name for p in (folder / name).iterdir() if p.stem not in ids)
            notes += [f"{len(extra)} files in {name} are in no id list, such as {extra[0]}"] if extra else []
    return notes


def draw_sheet(folder: Path, ids: list[str], h: Hierarchy) -> Image.Image:
    """A grid of photos with their masks over them, and the colour of each class below."""
    width, height = SHEET_CELL
    n_rows = -(-len(ids) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, n_rows * height + 40), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for position, sample_id in enumerate(ids):
        row, column = divmod(position, SHEET_COLUMNS)
        cell = overlay(folder, sample_id, h)
        cell.thumbnail((width - 8, height - 28))
        sheet.paste(cell, (column * width + 4, row * height + 22))
        draw.text((column * width + 4, row * height + 3), sample_id, "black", font)
    for position, leaf in enumerate(h.leaves):
        x, y = 4 + position * (SHEET_COLUMNS * width // h.num_leaves), n_rows * height + 10
        draw.rectangle((x, y, x + 20, y + 20), h.colours[leaf], "black")
        draw.text((x + 26, y + 2), h.names[leaf], "black", font)
    return sheet


def overlay(folder: Path, sample_id: str, h: Hierarchy) -> Image.Image:
    photo = np.asarray(read_photo(find_file(folder / PHOTO_FOLDER, sample_id, PHOTO_SUFFIXES)))
    labels = read_labels(find_file(folder / "gt_masks", sample_id, (".png", ".npy")))
    palette = np.full((256, 3), 255, np.uint8)  # void is white
    palette[: h.num_nodes] = h.colours
    shown = ~np.isin(labels, list(h.background))[..., None]
    mixed = 0.4 * photo + 0.6 * palette[labels]
    return Image.fromarray(np.where(shown, mixed, photo).astype(np.uint8))


def save_sheet(sheet: Image.Image, path: Path) -> None:
    try:
        sheet.save(path, quality=88)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write the contact sheet {path}: {error}; choose a .jpg or .png with --sheet"
        ) from error


# ---- the command line --------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        type=Path,
        help=f"folder with {RAW_FOLDER} or {' or '.join(MASK_FOLDERS)}, and {PHOTO_FOLDER}",
    )
    add("--out", type=Path, help="folder to write, e.g. data/pascal_part")
    add("--format", choices=FORMATS, help="kind of source; default: recognised by its files")
    add("--order", choices=("standard", "project"), help="what the labels of masks without a classes.txt mean")
    add("--annotations", type=Path, help="the folder of the .mat, .png or .npy files, where it is not found")
    add("--photos", type=Path, help="the folder of the photos, where it is not found")
    add("--split", choices=("auto", "official", "own"), default="auto",
        help="auto: the official split if the ids are those, else the source's lists, else an own one")  # fmt: skip
    add("--val-share", type=float, default=0.2, help="share of val in an own split (default 0.2)")
    add("--seed", type=int, default=0, help="of an own split, and of the contact sheet's choice (default 0)")
    add("--copy", action="store_true", help="copy photos; default: hard links, which take no space")
    add("--overwrite", action="store_true", help="move what is in --out aside, to <out>.old1")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--check", type=Path, metavar="FOLDER", help="only verify a prepared folder and draw a contact sheet")
    add("--sheet", type=Path, metavar="FILE", help="with --check: the sheet (default FOLDER/contact_sheet.jpg)")
    args = parser.parse_args()
    if args.check and (args.source or args.out):
        parser.error("--check FOLDER goes alone: it prepares nothing")
    if not args.check and not args.out:
        parser.error("say where to write, e.g. --out data/pascal_part")
    if not 0 < args.val_share < 1:
        parser.error(f"--val-share is {args.val_share}; it is a share between 0 and 1, e.g. 0.2")
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; at least 1")
    return args


if __name__ == "__main__":
    run_main(main)
