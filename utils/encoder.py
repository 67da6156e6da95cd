"""Masks -> label maps, a folder at a time: checked, turned with their photos, indexed PNGs, and encoding.json.

encoding.json says that it is not complete before the first map is written, and that it is after the last one.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from utils.cli import map_files
from utils.encoding import FORMAT, KEYS, RECORD, is_same, sha256, stamp
from utils.errors import UserError
from utils.files import read_json, remove_unfinished, write_json, write_whole
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder
from utils.images import Size, indexed_png, photo_header, upright
from utils.masks import MaskReader, find_masks

LOCK, FAULTS_SHOWN = ".encoding.lock", 20
OPEN_EXIF = (
    "its photo is turned or mirrored by EXIF, and sizes do not show what the mask was drawn on. Look at one, and set "
    "the key obey_exif to true (what a viewer shows) or to false (the stored pixels)"
)


@dataclass
class Encoder:
    """Encodes the masks of a folder for the photos of another, and what the user says of them.

    `classes` as in MaskReader; `ids` are those that must be whole, None all; `skip_faulty` lets even these be left out.
    """

    masks_dir: Path
    photos_dir: Path
    save_dir: Path
    hierarchy: Hierarchy
    classes: dict[str, str] | None = None
    obey_exif: bool | None = None
    ids: Collection[str] | None = None
    skip_faulty: bool = False

    def run(self) -> int:
        """Encodes; returns how many label maps were written.

        Afterwards `save_dir` holds the label maps of these masks and no other PNG: maps of masks that are gone are
        deleted. A map that is as it should be is not written again.

        Raises: UserError listing every faulty mask (all others are then encoded, and the next run goes on from there);
        or for PNGs that no run wrote.
        """
        if self.hierarchy.ignore_index > 255:
            raise UserError(f"the tree '{self.hierarchy.name}' has labels above 255; they do not fit a byte")
        photos = PhotoFolder(self.photos_dir)
        masks = find_masks(self.masks_dir, photos)
        try:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(self.save_dir / LOCK, timeout=0):
                return self._encode(masks, photos)
        except Timeout:
            raise UserError(f"{self.save_dir} is being written by another process; wait for its end") from None
        except OSError as error:
            raise UserError(f"cannot write label maps to {self.save_dir}: {error.strerror or error}") from error

    def _last_record(self) -> dict[str, Any]:
        """What the last run left, complete or not; `ids` are those whose label maps may be there."""
        try:
            record = read_json(self.save_dir / RECORD)
            files = {sample_id: old for sample_id, old in record["files"].items() if old.keys() >= KEYS}
            return record | {"files": files, "ids": {*record["files"], *record.get("ids", ())}}
        except (UserError, KeyError, TypeError, AttributeError):
            return {"files": {}, "ids": set()}

    def _encode(self, masks: Mapping[str, list[Path]], photos: PhotoFolder) -> int:
        remove_unfinished(self.save_dir)
        last = self._last_record()
        if strangers := {path.stem for path in self.save_dir.glob("[!.]*.png")} - last["ids"]:
            raise UserError(
                f"{self.save_dir} holds {len(strangers)} PNGs that no run of the encoder wrote (the first: "
                f"{min(strangers)}.png); move them away, or choose another --save_dir"
            )
        # where these differ, all is encoded again
        self.settings = {"format": FORMAT, "hierarchy": self.hierarchy.to_dict(), "classes": self.classes}
        self.settings |= {"obey_exif": self.obey_exif}
        self.old = last["files"] if last.items() >= self.settings.items() else {}
        self.reader, self.written = MaskReader(self.hierarchy, self.classes), []

        begun = {"complete": False, "ids": [*last["ids"], *masks]}
        self._save(self.old, begun)
        found = map_files(lambda i: self._record_or_fault(i, masks[i], photos), list(masks), "encoding")
        records = dict(zip(masks, found, strict=True))
        files = {i: record for i, record in records.items() if isinstance(record, dict)}
        must = set(masks if self.ids is None else self.ids)
        faults = {i: fault for i, fault in records.items() if isinstance(fault, str)}
        faults |= dict.fromkeys(must - masks.keys(), "it has no mask")
        if not self.skip_faulty and must & faults.keys():
            self._save(files, begun)
            raise UserError(_all_faults({i: fault for i, fault in faults.items() if i in must}, len(must)))
        for sample_id in last["ids"] - files.keys():
            (self.save_dir / f"{sample_id}.png").unlink(missing_ok=True)
        self._save(files, {"complete": True, "skipped": faults})
        return len(self.written)

    def _save(self, files: dict, state: dict[str, Any]) -> None:
        try:  # as seen from the label maps: a data set may be moved as a whole
            place = os.path.relpath(self.masks_dir, self.save_dir)
        except ValueError:  # on another drive of Windows
            place = os.path.abspath(self.masks_dir)
        record = state | {"masks_dir": place} | self.settings | {"files": files}
        write_json(record, self.save_dir / RECORD, indent=None)

    def _record_or_fault(self, sample_id: str, masks: list[Path], photos: PhotoFolder) -> dict[str, Any] | str:
        """Of one mask; a fault is told, so that the rest goes on."""
        if len(masks) > 1:
            return f"it has two masks, {masks[0]} and {masks[1]}; keep one"
        try:
            place = self.save_dir / f"{sample_id}.png"
            return self._record(masks[0], photos.find(sample_id), place, self.old.get(sample_id))
        except (UserError, OSError) as error:
            return str(error)

    def _record(self, mask: Path, photo: Path, target: Path, old: dict[str, Any] | None) -> dict[str, Any]:
        """Writes the label map of a mask, where the last run's does not stand. Raises: UserError, OSError."""
        stored, seen, orientation = photo_header(photo)
        record = {"source": mask.relative_to(self.masks_dir).as_posix(), "photo": [*stored, orientation]}
        is_there = old and target.is_file() and target.stat().st_size == old["encoded_bytes"]
        if is_there and old.items() >= record.items() and is_same(self.masks_dir, old):
            return old | stamp(mask)  # one that was only copied or touched has a new time
        labels = self.reader.read(mask)
        if self._is_stored(f"{mask}, for {photo.name}", labels.shape[::-1], stored, seen, orientation):
            labels = np.asarray(upright(Image.fromarray(labels), orientation))
        data = indexed_png(labels, self.hierarchy.colours)
        if not target.is_file() or target.read_bytes() != data:
            # not flushed to the disk one by one: a power cut may leave a map cut short, which reading names
            write_whole(data, target, sync=False)
            self.written.append(target.name)
        record |= stamp(mask) | {"sha256": sha256(mask), "encoded_bytes": len(data)}
        return record | {"counts": {str(v): n for v, n in enumerate(Image.fromarray(labels).histogram()) if n}}

    def _is_stored(self, mask: str, drawn: Size, stored: Size, seen: Size, orientation: int) -> bool:
        """Whether a mask was drawn on the stored pixels of a photo that is seen otherwise. Raises: UserError."""
        is_moved = orientation > 1
        if is_moved and drawn == seen == stored and self.obey_exif is None:
            raise UserError(OPEN_EXIF)
        is_stored = is_moved and (drawn != seen if self.obey_exif is None else not self.obey_exif)
        if drawn != (stored if is_stored else seen):
            ours, theirs, unturned = (f"{width}x{height}" for width, height in (drawn, seen, stored))
            exif = f" when seen as its EXIF orientation {orientation} says, {unturned} as stored (key obey_exif)"
            raise UserError(f"{mask}: is {ours} (width x height), the photo {theirs}" + exif * is_moved)
        return is_stored


def _all_faults(faults: dict[str, str], total: int) -> str:
    lines = [f"{sample_id}: {fault}" for sample_id, fault in faults.items()]
    more = [f"and {len(lines) - FAULTS_SHOWN} more"] if len(lines) > FAULTS_SHOWN else []
    return (
        f"{len(lines)} of {total} masks cannot be encoded:\n  "
        + "\n  ".join(lines[:FAULTS_SHOWN] + more)
        + "\nMend them and run again, or take them from the id lists, or leave them out with --skip-faulty"
    )
