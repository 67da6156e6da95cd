"""Masks -> label maps, a folder at a time: checked, turned with their photos, indexed PNGs, and encoding.json.

encoding.json says that it is not complete before the first map is written, and that it is after the last one.
"""

import hashlib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from utils.cli import map_files
from utils.errors import UserError
from utils.files import read_json, remove_unfinished, set_aside, write_json, write_whole
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder
from utils.images import indexed_png, photo_header, seen_size, upright
from utils.masks import MaskReader, find_masks

RECORD, LOCK = "encoding.json", ".encoding.lock"
FORMAT = 3
FAULTS_SHOWN = 20
KEYS = {"source", "photo", "bytes", "mtime_ns", "sha256", "encoded_bytes", "note", "counts"}  # of each mask
OPEN_EXIF = (
    "its photo is turned or mirrored by an EXIF orientation, and their sizes do not show whether the mask was drawn "
    "on what a viewer shows or on the stored pixels. Look at one, and set the key obey_exif to true (on what a viewer "
    "shows) or to false (on the stored pixels)"
)
BY_COLOUR = "hold the tree's colours at other indices, as some PNG optimisers leave them: read by colour"
TURNED = "were drawn on the stored pixels of a photo that EXIF turns: turned with it"


@dataclass(frozen=True)
class Wishes:
    """What the user says of the masks: classes and `by` as in MaskReader, the ending of their names, EXIF.

    `ids` are those that must be whole, None all; `skip_faulty` lets even these be left out.
    """

    classes: dict[str, str] | None = None
    by: str = "auto"
    ending: str = ""
    obey_exif: bool | None = None
    ids: Collection[str] | None = None
    skip_faulty: bool = False


WISHES = Wishes()


def encode_folder(
    masks_dir: Path, photos_dir: Path, save_dir: Path, hierarchy: Hierarchy, wishes: Wishes = WISHES
) -> int:
    """Encodes the masks of a folder; returns how many label maps were written.

    Afterwards `save_dir` holds the label maps of these masks and no other PNG: maps of masks that are gone are
    deleted, a folder with PNGs of unknown origin is set aside. A map that is as it should be is not written again.

    Raises: UserError listing every faulty mask; all others are then encoded, and the next run goes on from there.
    """
    if hierarchy.ignore_index > 255:
        raise UserError(f"the tree '{hierarchy.name}' has labels above 255; they do not fit a byte")
    photos = PhotoFolder(photos_dir)
    masks = find_masks(masks_dir, photos, wishes.ending)
    try:
        _make_way(save_dir)
        with FileLock(save_dir / LOCK, timeout=0):
            return _encode(masks, photos, masks_dir, save_dir, hierarchy, wishes)
    except Timeout:
        raise UserError(f"{save_dir} is being written by another process; wait for its end, and run again") from None
    except OSError as error:
        raise UserError(f"cannot write the encoded masks to {save_dir}: {error.strerror or error}") from error


def _encode(
    masks: Mapping[str, list[Path]],
    photos: PhotoFolder,
    masks_dir: Path,
    save_dir: Path,
    hierarchy: Hierarchy,
    wishes: Wishes,
) -> int:
    """`encode_folder` under the lock."""
    settings = {"format": FORMAT, "hierarchy": hierarchy.to_dict()}
    settings |= {"classes": wishes.classes, "by": wishes.by, "obey_exif": wishes.obey_exif}
    head = {"complete": False, "masks_dir": _place(masks_dir, save_dir)} | settings
    last = _last_record(save_dir)
    old = last["files"] if last.items() >= settings.items() else {}
    ours = {*last["files"], *last["ids"]}
    remove_unfinished(save_dir)

    def save(files: dict, **rest: Any) -> None:
        write_json(head | rest | {"files": files}, save_dir / RECORD, indent=None)

    save(old, ids=[*ours, *masks])
    jobs = [Job(i, paths, photos.find(i), old.get(i)) for i, paths in masks.items()]
    reader = MaskReader(hierarchy, wishes.classes, wishes.by)
    work = partial(encode_mask, reader=reader, masks_dir=masks_dir, save_dir=save_dir, obey_exif=wishes.obey_exif)
    outcomes = dict(zip(masks, map_files(work, jobs, "encoding"), strict=True))
    files = {i: outcome.record for i, outcome in outcomes.items() if outcome.record}
    must = set(masks if wishes.ids is None else wishes.ids)
    faults = {i: outcome.fault for i, outcome in outcomes.items() if outcome.fault}
    faults |= dict.fromkeys(must - masks.keys(), "it has no mask")
    if (faulty := {i: fault for i, fault in faults.items() if i in must}) and not wishes.skip_faulty:
        save(files, ids=[*ours, *masks])
        raise UserError(_all_faults(faulty, len(must)))

    for note in (BY_COLOUR, TURNED):
        _tell(note, [i for i, record in files.items() if record["note"] == note])
    _tell("were left out", [f"{i}: {fault}" for i, fault in faults.items()])
    for sample_id in ours - files.keys():
        (save_dir / f"{sample_id}.png").unlink(missing_ok=True)
    save(files, complete=True, skipped=faults)
    return sum(outcome.is_new for outcome in outcomes.values())


def _last_record(save_dir: Path) -> dict[str, Any]:
    """What the last run left, complete or not."""
    try:
        record = read_json(save_dir / RECORD)
        files = {i: old if old.keys() >= KEYS else {} for i, old in record["files"].items()}
        return {"ids": ()} | record | {"files": files}
    except (UserError, KeyError, TypeError, AttributeError):
        return {"ids": (), "files": {}}


def _make_way(save_dir: Path) -> None:
    """Sets a folder aside that holds PNGs which no run wrote, or which has lost its record; nothing is overwritten."""
    last = _last_record(save_dir)
    strangers = sorted({path.stem for path in save_dir.glob("[!.]*.png")} - {*last["files"], *last["ids"]})
    if strangers:
        aside = set_aside(save_dir.resolve())[0]
        print(
            f"{save_dir} held {len(strangers)} PNGs that its {RECORD} does not list (the first: {strangers[0]}.png); "
            f"it was moved to {aside}, and all is encoded anew",
            file=sys.stderr,
        )
    save_dir.mkdir(parents=True, exist_ok=True)


def _place(folder: Path, start: Path) -> str:
    """Where a folder is as seen from another: a data set may be moved as a whole."""
    try:
        return os.path.relpath(folder, start)
    except ValueError:  # on another drive of Windows
        return os.path.abspath(folder)


def _all_faults(faulty: dict[str, str], total: int) -> str:
    """The faults that end the run, equal ones once."""
    ids: dict[str, list[str]] = {}
    for sample_id, fault in faulty.items():
        ids.setdefault(fault, []).append(sample_id)
    lines = [f"{of[0]}{f' and {len(of) - 1} more' * (len(of) > 1)}: {fault}" for fault, of in ids.items()]
    more = [f"and {len(lines) - FAULTS_SHOWN} more"] if len(lines) > FAULTS_SHOWN else []
    return (
        f"{len(faulty)} of {total} masks cannot be encoded:\n  "
        + "\n  ".join(lines[:FAULTS_SHOWN] + more)
        + "\nMend them and run again, or take them from the id lists, or leave them out with --skip-faulty"
    )


def _tell(what: str, masks: list[str]) -> None:
    if masks:
        print(f"note: {len(masks)} masks {what} (the first: {masks[0]})", file=sys.stderr)


# ---- one mask ----------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One mask, its photo (or why there is none), and what the last run said of it."""

    sample_id: str
    masks: list[Path]
    photo: Path | str
    old: dict[str, Any] | None


class Outcome(NamedTuple):
    """What became of one mask: its record, or its fault."""

    record: dict[str, Any] | None = None
    fault: str = ""
    is_new: bool = False


def encode_mask(job: Job, reader: MaskReader, masks_dir: Path, save_dir: Path, obey_exif: bool | None) -> Outcome:
    """Writes the label map, where the last run's does not stand; a fault is told, so that the rest goes on."""
    try:
        if isinstance(job.photo, str):
            raise UserError(job.photo)
        if len(job.masks) > 1:
            raise UserError(f"it has two masks, {job.masks[0]} and {job.masks[1]}; keep one")
        mask, target = job.masks[0], save_dir / f"{job.sample_id}.png"
        size, orientation = photo_header(job.photo)
        record = {"source": mask.relative_to(masks_dir).as_posix(), "photo": [*size, orientation]}
        if job.old and job.old.items() >= record.items() and is_same(mask, job.old) and _is_whole(target, job.old):
            return Outcome(job.old | _stamp(mask))  # one that was only copied or touched has a new time
        labels, by_colour = reader.read(mask)
        is_turned = _is_stored(job, labels.shape[::-1], size, orientation, obey_exif)
        if is_turned:
            labels = np.asarray(upright(Image.fromarray(labels), orientation))
        data = indexed_png(labels, reader.palette)
        is_new = not target.is_file() or target.read_bytes() != data
        if is_new:  # not flushed to the disk one by one: a power cut may leave a map cut short, which reading names
            write_whole(data, target, sync=False)
        record |= _stamp(mask) | {"sha256": _sha256(mask), "encoded_bytes": len(data)}
        record["note"] = TURNED if is_turned else BY_COLOUR if by_colour else ""
        record["counts"] = {str(v): n for v, n in enumerate(Image.fromarray(labels).histogram()) if n}
        return Outcome(record, is_new=is_new)
    except (UserError, OSError) as error:
        return Outcome(fault=str(error))


def is_same(mask: str | Path, old: dict[str, Any]) -> bool:
    """Whether a mask is what it was by size and time, or else by its content. Raises: OSError."""
    now = _stamp(mask)
    if now["bytes"] != old["bytes"]:
        return False
    return now["mtime_ns"] == old["mtime_ns"] or _sha256(mask) == old["sha256"]


def _is_stored(job: Job, mask: tuple[int, int], size: tuple[int, int], orientation: int, obey: bool | None) -> bool:
    """Whether the mask was drawn on the stored pixels of a photo that is seen otherwise. Raises: UserError."""
    seen = seen_size(size, orientation)
    if orientation > 1 and mask == seen == size and obey is None:
        raise UserError(OPEN_EXIF)
    is_stored = orientation > 1 and (mask != seen if obey is None else not obey)
    if mask != (size if is_stored else seen):
        ours, theirs, stored = (f"{width}x{height}" for width, height in (mask, seen, size))
        text = f"{job.masks[0]}: is {ours} (width x height), its photo {job.photo.name} is {theirs}"
        if orientation > 1:
            text += f" when seen as its EXIF orientation {orientation} says, {stored} as stored (key obey_exif)"
        raise UserError(text)
    return is_stored


def _is_whole(encoded: Path, old: dict[str, Any]) -> bool:
    return encoded.is_file() and encoded.stat().st_size == old["encoded_bytes"]


def _stamp(path: str | Path) -> dict[str, int]:
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
