"""One mask -> one label map, in a worker process: checked against its photo, and turned with it where it has to be."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.files import write_whole
from utils.images import indexed_png, photo_header, upright
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


@dataclass(frozen=True)
class Outcome:
    """What became of one mask: its record, or its fault."""

    sample_id: str
    record: dict[str, Any] = field(default_factory=dict)
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
        record = _old_record(job, rules)
        if record is None or record.get("orientation", 1) != orientation:
            return _encode(job, rules, size, orientation)
        if (record["width"], record["height"]) != _seen(size, orientation):
            raise UserError(_misfit(job, (record["width"], record["height"]), size, orientation))
        return Outcome(job.sample_id, record)
    except _OpenExif as tag:
        return Outcome(job.sample_id, fault="whether its EXIF orientation counts is open", open_exif=tag.args[0])
    except (UserError, OSError) as error:
        return Outcome(job.sample_id, fault=str(error))


def stands(job: Job, rules: Rules) -> bool:
    """Whether the last run's record and map hold, by sizes and times alone."""
    old = job.old
    if old is None or len(job.masks) != 1 or _source(job, rules) != old["source"]:
        return False
    encoded = rules.save_dir / f"{job.sample_id}.png"
    is_whole = encoded.is_file() and encoded.stat().st_size == old["encoded_bytes"]
    return is_whole and stamp(job.masks[0]) == {key: old[key] for key in ("bytes", "mtime_ns")}


def stamp(path: str | Path) -> dict[str, int]:
    """Size and time. Raises: OSError."""
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _old_record(job: Job, rules: Rules) -> dict[str, Any] | None:
    """The last run's record, where it holds; for a mask that was only copied or touched with its new time."""
    if job.old is None:
        return None
    touched = job.old | stamp(job.masks[0])
    if not stands(Job(job.sample_id, job.masks, job.photo, touched), rules):
        return None
    return touched if stands(job, rules) or (touched["bytes"] == job.old["bytes"] and _same(job)) else None


def _encode(job: Job, rules: Rules, size: tuple[int, int], orientation: int) -> Outcome:
    mask = job.masks[0]
    labels, by_colour = rules.reader.read(mask)
    is_turned = _is_stored(job, labels.shape[::-1], size, orientation, rules.obey_exif)
    if is_turned:
        labels = np.asarray(upright(Image.fromarray(labels), orientation))
    counts = Image.fromarray(labels).histogram()
    data = indexed_png(labels, rules.reader.palette)
    target = rules.save_dir / f"{job.sample_id}.png"
    is_new = not target.is_file() or target.read_bytes() != data
    if is_new:  # not flushed to the disk one by one: a power cut may leave a map cut short, which reading names
        write_whole(data, target, sync=False)
    record = {
        "source": _source(job, rules),
        **stamp(mask),
        "sha256": sha256(mask),
        "encoded_bytes": len(data),
        "width": labels.shape[1],
        "height": labels.shape[0],
        "counts": {str(label): count for label, count in enumerate(counts) if count},
    }
    record |= {"orientation": orientation, "turned": is_turned} if orientation > 1 else {}
    record |= {"by_colour": True} if by_colour else {}
    return Outcome(job.sample_id, record, is_new=is_new)


def _is_stored(job: Job, mask: tuple[int, int], size: tuple[int, int], orientation: int, obey: bool | None) -> bool:
    """Whether the mask was drawn on the stored pixels of a photo that is seen otherwise."""
    fits_seen, fits_stored = mask == _seen(size, orientation), mask == size
    if orientation > 1 and fits_seen and fits_stored and obey is None:
        raise _OpenExif(orientation)
    is_stored = orientation > 1 and (not fits_seen if obey is None else not obey)
    if not (fits_stored if is_stored else fits_seen):
        raise UserError(_misfit(job, mask, size, orientation))
    return is_stored


def _seen(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation >= 5 else size


def _misfit(job: Job, mask: tuple[int, int], size: tuple[int, int], orientation: int) -> str:
    width, height = _seen(size, orientation)
    text = f"{job.masks[0]}: is {mask[0]}x{mask[1]} (width x height), its photo {job.photo.name} is {width}x{height}"
    if orientation > 1:
        text += f" when seen as its EXIF orientation {orientation} says, {size[0]}x{size[1]} as stored (key obey_exif)"
    return text


def _source(job: Job, rules: Rules) -> str:
    return job.masks[0].relative_to(rules.masks_dir).as_posix()


def _same(job: Job) -> bool:
    return sha256(job.masks[0]) == job.old["sha256"]
