"""One mask -> one label map, in a worker process: checked against its photo, and turned with it where it has to be."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.files import write_whole
from utils.images import indexed_png, photo_header, seen_size, upright
from utils.masks import MaskReader


@dataclass(frozen=True)
class Rules:
    """What a worker process must know."""

    reader: MaskReader
    masks_dir: Path
    save_dir: Path
    obey_exif: bool | None


@dataclass(frozen=True)
class Job:
    """One mask, its photo (or why there is none), and what the last run said of it."""

    sample_id: str
    masks: list[Path]
    photo: Path | str
    old: dict[str, Any] | None


class Outcome(NamedTuple):
    """What became of one mask: its record, or its fault."""

    sample_id: str
    record: dict[str, Any] | None = None
    fault: str = ""
    is_new: bool = False
    open_exif: int = 0  # the photo's orientation, where it is open whether the mask has it, too


class _OpenExif(Exception):
    """The orientation of a photo that may or may not be its mask's."""


def encode_mask(job: Job, rules: Rules) -> Outcome:
    """Writes the label map, where the last run's does not stand; a fault is told, so that the rest goes on."""
    try:
        if isinstance(job.photo, str):
            raise UserError(job.photo)
        if len(job.masks) > 1:
            raise UserError(f"two masks of '{job.sample_id}': {job.masks[0]} and {job.masks[1]}; keep one")
        size, orientation = photo_header(job.photo)
        record, is_new = _kept(job, rules), False
        if record is None or record["orientation"] != orientation:
            record, is_new = _encode(job, rules, size, orientation)
        elif (record["width"], record["height"]) != seen_size(size, orientation):
            raise UserError(_misfit(job, (record["width"], record["height"]), size, orientation))
        return Outcome(job.sample_id, record, is_new=is_new)
    except _OpenExif as tag:
        return Outcome(job.sample_id, fault="whether its EXIF orientation counts is open", open_exif=tag.args[0])
    except (UserError, OSError) as error:
        return Outcome(job.sample_id, fault=str(error))


def is_same(mask: str | Path, old: dict[str, Any]) -> bool:
    """Whether a mask is what it was by size and time, or else by its content. Raises: OSError."""
    now = _stamp(mask)
    if now["bytes"] != old["bytes"]:
        return False
    return now["mtime_ns"] == old["mtime_ns"] or _sha256(mask) == old["sha256"]


def _kept(job: Job, rules: Rules) -> dict[str, Any] | None:
    """The last run's record where it still holds; a mask that was only copied or touched has a new time."""
    old, encoded = job.old, rules.save_dir / f"{job.sample_id}.png"
    if not old or old["source"] != _source(job, rules) or not is_same(job.masks[0], old):
        return None
    return old | _stamp(job.masks[0]) if encoded.is_file() and encoded.stat().st_size == old["encoded_bytes"] else None


def _encode(job: Job, rules: Rules, size: tuple[int, int], orientation: int) -> tuple[dict[str, Any], bool]:
    """The record of the label map, and whether it had to be written."""
    mask = job.masks[0]
    labels, by_colour = rules.reader.read(mask)
    is_turned = _is_stored(job, labels.shape[::-1], size, orientation, rules.obey_exif)
    if is_turned:
        labels = np.asarray(upright(Image.fromarray(labels), orientation))
    data, target = indexed_png(labels, rules.reader.palette), rules.save_dir / f"{job.sample_id}.png"
    is_new = not target.is_file() or target.read_bytes() != data
    if is_new:  # not flushed to the disk one by one: a power cut may leave a map cut short, which reading names
        write_whole(data, target, sync=False)
    return {
        "source": _source(job, rules),
        **_stamp(mask),
        "sha256": _sha256(mask),
        "encoded_bytes": len(data),
        "width": labels.shape[1],
        "height": labels.shape[0],
        "orientation": orientation,
        "turned": is_turned,
        "by_colour": by_colour,
        "counts": {str(label): count for label, count in enumerate(Image.fromarray(labels).histogram()) if count},
    }, is_new


def _is_stored(job: Job, mask: tuple[int, int], size: tuple[int, int], orientation: int, obey: bool | None) -> bool:
    """Whether the mask was drawn on the stored pixels of a photo that is seen otherwise."""
    fits_seen, fits_stored = mask == seen_size(size, orientation), mask == size
    if orientation > 1 and fits_seen and fits_stored and obey is None:
        raise _OpenExif(orientation)
    is_stored = orientation > 1 and (not fits_seen if obey is None else not obey)
    if not (fits_stored if is_stored else fits_seen):
        raise UserError(_misfit(job, mask, size, orientation))
    return is_stored


def _misfit(job: Job, mask: tuple[int, int], size: tuple[int, int], orientation: int) -> str:
    width, height = seen_size(size, orientation)
    text = f"{job.masks[0]}: is {mask[0]}x{mask[1]} (width x height), its photo {job.photo.name} is {width}x{height}"
    if orientation > 1:
        text += f" when seen as its EXIF orientation {orientation} says, {size[0]}x{size[1]} as stored (key obey_exif)"
    return text


def _source(job: Job, rules: Rules) -> str:
    return job.masks[0].relative_to(rules.masks_dir).as_posix()


def _stamp(path: str | Path) -> dict[str, int]:
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
