"""Masks -> label maps, a folder at a time: checked, turned with their photos, indexed PNGs, and encoding.json.

encoding.json says that it is not complete before the first map is written, and that it is after the last one.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from utils.classes import VOID
from utils.cli import map_files
from utils.errors import UserError
from utils.files import names_aside, read_json, remove_unfinished, write_whole
from utils.ids import PhotoFolder
from utils.label_map import Job, Rules, encode_mask
from utils.masks import MaskReader, find_masks

if TYPE_CHECKING:  # it brings torch with it, which the worker processes can do without
    from utils.hierarchy import Hierarchy

RECORD, LOCK = "encoding.json", ".encoding.lock"
FORMAT = 2
FAULTS_SHOWN = 20
LABELS = 256  # one byte a pixel
SLICE = 5000  # masks between two saves of what is done
KEYS = set("source bytes mtime_ns sha256 encoded_bytes width height counts orientation".split())
SAME = ("format", "hierarchy", "classes", "by", "obey_exif")  # where one differs, all is encoded again
OPEN_EXIF = (
    "the photos of {} masks (the first: {}, EXIF orientation {}) are turned or mirrored by EXIF, and their sizes do "
    "not show whether the masks were drawn on what a viewer shows or on the stored pixels. Look at one, and set the "
    "key obey_exif to true (on what a viewer shows) or to false (on the stored pixels)"
)


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
    masks_dir: Path, photos_dir: Path, save_dir: Path, hierarchy: "Hierarchy", wishes: Wishes = WISHES
) -> int:
    """Encodes the masks of a folder; returns how many label maps were written.

    Afterwards `save_dir` holds the label maps of these masks and no other PNG: maps of masks that are gone are
    deleted, PNGs of unknown origin are set aside. A map that is as it should be is not written again.

    Raises: UserError listing every faulty mask; all others are then encoded, and the next run goes on from there.
    """
    if hierarchy.num_nodes > LABELS or hierarchy.ignore_index >= LABELS:
        raise UserError(f"the tree '{hierarchy.name}' has labels above {LABELS - 1}; they do not fit a byte")
    photos = PhotoFolder(photos_dir)
    masks = find_masks(masks_dir, photos, wishes.ending)
    is_ours = not save_dir.exists()
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(save_dir / LOCK, timeout=0):
            return _Run(masks_dir, save_dir, hierarchy, wishes).encode(masks, photos)
    except Timeout:
        raise UserError(f"{save_dir} is being written by another process; wait for its end, and run again") from None
    except OSError as error:
        raise UserError(f"cannot write the encoded masks to {save_dir}: {error.strerror or error}") from error
    finally:
        if is_ours and save_dir.is_dir() and not any(save_dir.glob("*.png")):  # nothing came of it
            shutil.rmtree(save_dir)


class _Run:
    """One encoding of a folder, under its lock."""

    def __init__(self, masks_dir: Path, save_dir: Path, hierarchy: "Hierarchy", wishes: Wishes) -> None:
        self.save_dir, self.hierarchy, self.wishes = save_dir, hierarchy, wishes
        self.rules = Rules(mask_reader(hierarchy, wishes.classes, wishes.by), masks_dir, save_dir, wishes.obey_exif)
        self.head = {
            "format": FORMAT,
            "tree": hierarchy.name,
            "fingerprint": hierarchy.fingerprint,
            "masks_dir": _places(masks_dir, save_dir),
            "hierarchy": hierarchy.to_dict(),
            "classes": wishes.classes,
            "by": wishes.by,
            "obey_exif": wishes.obey_exif,
        }
        self.files: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, str] = {}
        self.open_exif: dict[str, int] = {}

    def encode(self, masks: dict[str, list[Path]], photos: PhotoFolder) -> int:
        last = _last_record(self.save_dir)
        old = last["files"] if all(last.get(key) == self.head[key] for key in SAME) else {}
        ours = {*last["files"], *last["writing"]}
        remove_unfinished(self.save_dir)
        _set_aside([path for path in sorted(self.save_dir.glob("[!.]*.png")) if path.stem not in ours], self.save_dir)
        jobs = [Job(i, paths, photos.find_or_why(i), old.get(i)) for i, paths in masks.items()]
        self.files = {job.sample_id: job.old for job in jobs if job.old}
        must = masks.keys() if self.wishes.ids is None else set(self.wishes.ids)
        self.faults = {i: f"id '{i}' has no mask" for i in must if i not in masks}
        claim = partial(self._write, complete=False, writing=sorted({*masks, *ours}))

        changed = 0
        for start in range(0, len(jobs), SLICE):
            claim()
            changed += self._encode(jobs[start : start + SLICE])
        faulty = self.faults.keys() & must
        if self.open_exif.keys() & must or (faulty and not self.wishes.skip_faulty):
            claim()
            raise UserError(self._all_faults(faulty, len(must)))
        self._tell()
        for sample_id in ours - self.files.keys():
            (self.save_dir / f"{sample_id}.png").unlink(missing_ok=True)
        self._write(complete=True, skipped=self.faults, **_totals(self.files, self.hierarchy))
        return changed

    def _encode(self, jobs: list[Job]) -> int:
        outcomes = map_files(partial(encode_mask, rules=self.rules), jobs, "encoding")
        for outcome in outcomes:
            self.files[outcome.sample_id] = outcome.record
            if outcome.fault:
                self.faults[outcome.sample_id] = outcome.fault
                del self.files[outcome.sample_id]
            if outcome.open_exif:
                self.open_exif[outcome.sample_id] = outcome.open_exif
        return sum(outcome.is_new for outcome in outcomes)

    def _write(self, **rest: Any) -> None:
        """encoding.json: short enough at its head to be read by people, one line a file."""
        content = self.head | rest | {"masks": len(self.files), "files": self.files}
        lines = [f"  {json.dumps(key)}: {_one_a_line(value)}" for key, value in content.items()]
        write_whole("{\n" + ",\n".join(lines) + "\n}\n", self.save_dir / RECORD)

    def _all_faults(self, faulty: set[str], total: int) -> str:
        """The faults that end the run; that of EXIF once for all."""
        faults = [fault for i, fault in self.faults.items() if i in faulty and i not in self.open_exif]
        if turned := [i for i in self.open_exif if i in faulty]:
            faults.insert(0, OPEN_EXIF.format(len(turned), turned[0], self.open_exif[turned[0]]))
        more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        return (
            f"{len(faulty)} of {total} masks cannot be encoded:\n  "
            + "\n  ".join(faults[:FAULTS_SHOWN] + more)
            + "\nMend them and run again, or take them from the id lists, or leave them out with --skip-faulty"
        )

    def _tell(self) -> None:
        """What the user should know of masks that were left out, or read otherwise than by their plain values."""
        for what, found in {
            "were left out": [f"{i} {fault}" for i, fault in self.faults.items()],
            "hold the tree's colours at other indices, as some PNG optimisers leave them: read by colour": [
                i for i, record in self.files.items() if record.get("by_colour")
            ],
            "were drawn on the stored pixels of a photo that EXIF turns: turned with it": [
                i for i, record in self.files.items() if record.get("turned")
            ],
        }.items():
            if found:
                print(f"note: {len(found)} masks {what} (the first: {found[0]})", file=sys.stderr)


def _places(folder: Path, start: Path) -> list[str]:
    """Where a folder is: as seen from another, for a data set that is moved as a whole, and by its whole path."""
    whole = os.path.abspath(folder)
    try:
        return [os.path.relpath(folder, start), whole]
    except ValueError:  # on another drive of Windows
        return [whole]


def mask_reader(hierarchy: "Hierarchy", classes: dict[str, str] | None, by: str) -> MaskReader:
    """What turns masks, whose values are `classes` of the tree (None: its ids), into labels."""
    label_of = {name: label for label, name in enumerate(hierarchy.names)} | {VOID: hierarchy.ignore_index}
    labels = classes and {value: label_of[name] for value, name in classes.items()}
    known = (*range(hierarchy.num_nodes), hierarchy.ignore_index)
    return MaskReader(hierarchy.name, known, hierarchy.ignore_index, hierarchy.colours, labels, by)


def _last_record(save_dir: Path) -> dict[str, Any]:
    """What the last run left, complete or not."""
    try:
        record = read_json(save_dir / RECORD)
        files = {i: old if old.keys() >= KEYS else {} for i, old in record["files"].items()}
        return {"writing": ()} | record | {"files": files}
    except (UserError, KeyError, TypeError, AttributeError):
        return {"writing": (), "files": {}}


def _set_aside(files: list[Path], save_dir: Path) -> None:
    """Moves files into a new folder beside `save_dir`, and says so."""
    if not files:
        return
    (aside,) = names_aside([save_dir.resolve()])
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    print(
        f"{save_dir} held {len(files)} PNGs that its {RECORD} does not list (the first: {files[0].name}); moved to "
        f"{aside}",
        file=sys.stderr,
    )


def _totals(files: dict[str, dict[str, Any]], hierarchy: "Hierarchy") -> dict[str, Any]:
    """Per node the pixels at or below it, those labelled as itself, and the photos with any."""
    pixels, labelled, photos = Counter(), Counter(), Counter()
    paths = dict(enumerate(hierarchy.paths)) | {hierarchy.ignore_index: (hierarchy.ignore_index,)}
    for record in files.values():
        for label, count in record["counts"].items():
            labelled[int(label)] += count
            pixels.update(dict.fromkeys(paths[int(label)], count))
        photos.update({node for label in record["counts"] for node in paths[int(label)]})
    nodes = {
        name: {"id": v, "pixels": pixels[v], "labelled": labelled[v], "photos": photos[v]}
        for v, name in enumerate(hierarchy.names)
    }
    void = hierarchy.ignore_index
    names = {hierarchy.names[v]: [hierarchy.names[u] for u in path] for v, path in enumerate(hierarchy.paths)}
    return {"paths": names, "nodes": nodes, "ignored": {"pixels": pixels[void], "photos": photos[void]}}


def _one_a_line(value: Any) -> str:
    """JSON with the entries of an object on lines of their own."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n  }"
