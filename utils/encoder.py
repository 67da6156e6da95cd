"""Masks -> label maps, a folder at a time: checked, turned with their photos, indexed PNGs, and encoding.json.

encoding.json says that it is not complete before the first map is written, and that it is after the last one.
"""

import hashlib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
            return _Run(masks_dir, save_dir, hierarchy, wishes).encode(masks, photos)
    except Timeout:
        raise UserError(f"{save_dir} is being written by another process; wait for its end, and run again") from None
    except OSError as error:
        raise UserError(f"cannot write the encoded masks to {save_dir}: {error.strerror or error}") from error


class _Run:
    """One encoding of a folder, under its lock."""

    def __init__(self, masks_dir: Path, save_dir: Path, hierarchy: Hierarchy, wishes: Wishes) -> None:
        self.masks_dir, self.save_dir, self.wishes = masks_dir, save_dir, wishes
        self.reader = MaskReader(hierarchy, wishes.classes, wishes.by)
        self.settings = {"format": FORMAT, "hierarchy": hierarchy.to_dict()}  # where they differ, all is encoded again
        self.settings |= {"classes": wishes.classes, "by": wishes.by, "obey_exif": wishes.obey_exif}
        last = _last_record(save_dir)
        self.old = last["files"] if last.items() >= self.settings.items() else {}
        self.ours = {*last["files"], *last["ids"]}
        self.written: list[str] = []

    def encode(self, masks: Mapping[str, list[Path]], photos: PhotoFolder) -> int:
        remove_unfinished(self.save_dir)
        self._save(self.old, complete=False, ids=[*self.ours, *masks])
        found = map_files(lambda i: self._record_or_fault(i, masks[i], photos.find(i)), list(masks), "encoding")
        records = dict(zip(masks, found, strict=True))
        files = {i: record for i, record in records.items() if isinstance(record, dict)}
        must = set(masks if self.wishes.ids is None else self.wishes.ids)
        faults = {i: record for i, record in records.items() if isinstance(record, str)}
        faults |= dict.fromkeys(must - masks.keys(), "it has no mask")
        if (faulty := {i: fault for i, fault in faults.items() if i in must}) and not self.wishes.skip_faulty:
            self._save(files, complete=False, ids=[*self.ours, *masks])
            raise UserError(_all_faults(faulty, len(must)))
        for note in (BY_COLOUR, TURNED):
            _tell(note, [i for i, record in files.items() if record["note"] == note])
        _tell("were left out", [f"{i}: {fault}" for i, fault in faults.items()])
        for sample_id in self.ours - files.keys():
            (self.save_dir / f"{sample_id}.png").unlink(missing_ok=True)
        self._save(files, complete=True, skipped=faults)
        return len(self.written)

    def _save(self, files: dict, **rest: Any) -> None:
        record = rest | {"masks_dir": _place(self.masks_dir, self.save_dir)} | self.settings | {"files": files}
        write_json(record, self.save_dir / RECORD, indent=None)

    def _record_or_fault(self, sample_id: str, masks: list[Path], photo: Path | str) -> dict[str, Any] | str:
        """Of one mask; a fault is told, so that the rest goes on."""
        try:
            if isinstance(photo, str):
                return photo
            if len(masks) > 1:
                return f"it has two masks, {masks[0]} and {masks[1]}; keep one"
            return self._record(masks[0], photo, self.save_dir / f"{sample_id}.png", self.old.get(sample_id))
        except (UserError, OSError) as error:
            return str(error)

    def _record(self, mask: Path, photo: Path, target: Path, old: dict[str, Any] | None) -> dict[str, Any]:
        """Writes the label map of a mask, where the last run's does not stand. Raises: UserError, OSError."""
        size, orientation = photo_header(photo)
        record = {"source": mask.relative_to(self.masks_dir).as_posix(), "photo": [*size, orientation]}
        is_there = old and target.is_file() and target.stat().st_size == old["encoded_bytes"]
        if is_there and old.items() >= record.items() and is_same(mask, old):
            return old | _stamp(mask)  # one that was only copied or touched has a new time
        labels, by_colour = self.reader.read(mask)
        is_turned = _is_stored(mask, labels.shape[::-1], photo, size, orientation, self.wishes.obey_exif)
        if is_turned:
            labels = np.asarray(upright(Image.fromarray(labels), orientation))
        data = indexed_png(labels, self.reader.palette)
        if not target.is_file() or target.read_bytes() != data:
            # not flushed to the disk one by one: a power cut may leave a map cut short, which reading names
            write_whole(data, target, sync=False)
            self.written.append(target.name)
        record |= _stamp(mask) | {"sha256": _sha256(mask), "encoded_bytes": len(data)}
        record["note"] = TURNED if is_turned else BY_COLOUR if by_colour else ""
        return record | {"counts": {str(v): n for v, n in enumerate(Image.fromarray(labels).histogram()) if n}}


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


def is_same(mask: str | Path, old: dict[str, Any]) -> bool:
    """Whether a mask is what it was by size and time, or else by its content. Raises: OSError."""
    now = _stamp(mask)
    if now["bytes"] != old["bytes"]:
        return False
    return now["mtime_ns"] == old["mtime_ns"] or _sha256(mask) == old["sha256"]


def _is_stored(
    mask: Path, drawn: tuple[int, int], photo: Path, size: tuple[int, int], orientation: int, obey: bool | None
) -> bool:
    """Whether a mask was drawn on the stored pixels of a photo that is seen otherwise. Raises: UserError."""
    seen = seen_size(size, orientation)
    if orientation > 1 and drawn == seen == size and obey is None:
        raise UserError(OPEN_EXIF)
    is_stored = orientation > 1 and (drawn != seen if obey is None else not obey)
    if drawn != (size if is_stored else seen):
        ours, theirs, stored = (f"{width}x{height}" for width, height in (drawn, seen, size))
        text = f"{mask}: is {ours} (width x height), its photo {photo.name} is {theirs}"
        if orientation > 1:
            text += f" when seen as its EXIF orientation {orientation} says, {stored} as stored (key obey_exif)"
        raise UserError(text)
    return is_stored


def _stamp(path: str | Path) -> dict[str, int]:
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
