"""Encoded label maps: checked against the tree and the photos, indexed PNGs, and encoding.json about them.

encoding.json is written last and only for a set without faults, so where it stands all files are whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.images import MASK_SUFFIXES, PHOTO_SUFFIXES, find_file, photo_size, read_labels, write_indexed
from utils.locks import try_lock
from utils.parallel import map_with_progress

if TYPE_CHECKING:  # it brings torch with it, which the worker processes can do without
    from utils.hierarchy import Hierarchy

RECORD = "encoding.json"
STAGING, LOCK = ".partial-encoding", ".lock"
FORMAT = 1
FAULTS_SHOWN = 20
LABELS = 256  # one byte a pixel


@dataclass(frozen=True)
class Encoding:
    """What encoding.json says: the ids, and per node of the tree (in its order) how much there is of it."""

    ids: frozenset[str]
    pixels: tuple[int, ...]  # of the node and its descendants
    labelled: tuple[int, ...]  # of the node itself
    photos: tuple[int, ...]  # with a pixel of the node or its descendants
    ignored: int  # pixels


@dataclass(frozen=True)
class Rules:
    """What a worker process must know of the tree and the folders."""

    tree: str
    allowed: tuple[int, ...]
    palette: tuple[tuple[int, int, int], ...]
    photos_dir: Path
    save_dir: Path
    staging: Path


@dataclass(frozen=True)
class Outcome:
    """What became of one mask: its record, or its fault."""

    sample_id: str
    record: dict[str, Any] | None = None
    fault: str = ""


def load_encoding(labels_dir: str | Path, hierarchy: "Hierarchy") -> Encoding:
    """The encoding of a folder of label maps.

    Raises: UserError where it is missing, damaged or made with another tree.
    """
    path = Path(labels_dir) / RECORD
    again = "run: python tools/dataset_hie_enc.py (with the --cfg of this experiment)"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: the masks are not encoded yet; {again}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {again}") from error
    try:
        if record["format"] != FORMAT:
            raise UserError(f"{path} is of format {record['format']}, this program reads {FORMAT}; {again}")
        _check_tree(record, hierarchy, f"{path} {{}}; {again}, or choose the tree it was made with")
        nodes = [record["nodes"][name] for name in hierarchy.names]
        counts = {key: tuple(int(node[key]) for node in nodes) for key in ("pixels", "labelled", "photos")}
        return Encoding(ids=frozenset(record["files"]), ignored=int(record["ignored"]["pixels"]), **counts)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from error


def _check_tree(record: dict[str, Any], hierarchy: "Hierarchy", message: str) -> None:
    if record["fingerprint"] != hierarchy.fingerprint:
        same_name = record["tree"] == hierarchy.name
        fault = f"was made with the tree '{record['tree']}'"
        fault += ", which has changed since" if same_name else f", this experiment uses '{hierarchy.name}'"
        raise UserError(message.format(fault))
    if record["hierarchy"]["ignore_index"] != hierarchy.ignore_index:
        theirs = record["hierarchy"]["ignore_index"]
        raise UserError(message.format(f"has ignore_index {theirs}, the tree has {hierarchy.ignore_index}"))


def check_classes(order: dict[int, str], hierarchy: "Hierarchy", source: str | Path) -> None:
    """Holds the classes that the masks claim (label -> name, or "void") against the tree.

    Raises: UserError where a label means something else in the tree, or a leaf is not listed.
    """
    ours = dict(enumerate(hierarchy.names)) | {hierarchy.ignore_index: "void"}
    wrong = [
        f"{label} is '{name}', in the tree '{ours.get(label, 'no label')}'"
        for label, name in order.items()
        if ours.get(label) != name
    ]
    wrong += [f"{leaf} ('{ours[leaf]}') is missing" for leaf in hierarchy.leaves if leaf not in order]
    if wrong:
        raise UserError(
            f"{source} does not fit the tree '{hierarchy.name}': {'; '.join(wrong)}. Relabel the masks, "
            "or give a tree in their order with --hierarchy"
        )


def encode_folder(masks_dir: Path, photos_dir: Path, save_dir: Path, hierarchy: "Hierarchy") -> tuple[Encoding, int]:
    """Encodes all masks of a folder; returns the encoding and how many files were new or changed.

    Afterwards `save_dir` holds the label maps of these masks and no other PNG: maps of masks that are gone are
    deleted, PNGs of unknown origin are moved aside.

    Raises: UserError listing every faulty mask, and then nothing in `save_dir` has changed.
    """
    if hierarchy.num_nodes > LABELS or hierarchy.ignore_index >= LABELS:
        raise UserError(f"the tree '{hierarchy.name}' has labels above {LABELS - 1}; they do not fit a byte")
    masks = find_masks(masks_dir)
    if not photos_dir.is_dir():
        raise UserError(f"the folder of photos {photos_dir} does not exist; masks are checked against their photos")
    made_it = not save_dir.exists()
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        with _staging_folder(save_dir) as staging:
            old, known = _last_run(save_dir, hierarchy)
            rules = Rules(
                tree=hierarchy.name,
                allowed=(*range(hierarchy.num_nodes), hierarchy.ignore_index),
                palette=hierarchy.colours,
                photos_dir=photos_dir,
                save_dir=save_dir,
                staging=staging,
            )
            jobs = [(mask, old.get(mask.stem)) for mask in masks]
            outcomes = map_with_progress(partial(_encode_job, rules=rules), jobs, "encoding")
            if faults := [outcome.fault for outcome in outcomes if outcome.fault]:
                raise UserError(_all_faults(faults, len(masks)))
            records = {outcome.sample_id: outcome.record for outcome in outcomes}
            changed = _publish(records, old, known, staging, save_dir, hierarchy)
    except OSError as error:
        raise UserError(f"cannot write the encoded masks to {save_dir}: {error.strerror or error}") from error
    finally:
        if made_it and save_dir.is_dir() and not any(save_dir.iterdir()):
            save_dir.rmdir()
    return load_encoding(save_dir, hierarchy), changed


def find_masks(masks_dir: Path) -> list[Path]:
    """The .png and .npy files of a folder, sorted by id. Raises: UserError for none, or two of one id."""
    if not masks_dir.is_dir():
        raise UserError(f"the folder of masks {masks_dir} does not exist; give it with --gtdatadir or --cfg")
    masks = [path for path in masks_dir.iterdir() if path.suffix.lower() in MASK_SUFFIXES and path.name[0] != "."]
    if not masks:
        raise UserError(f"{masks_dir} holds no mask; expected files that end in {' or '.join(MASK_SUFFIXES)}")
    masks.sort(key=lambda path: (path.stem, path.suffix))
    for one, other in pairwise(masks):
        if one.stem == other.stem:
            raise UserError(f"{masks_dir} holds two masks of '{one.stem}': {one.name} and {other.name}; keep one")
    return masks


# ---- one mask, in a worker process -------------------------------------------------------------------------


def _encode_job(job: tuple[Path, dict[str, Any] | None], rules: Rules) -> Outcome:
    mask, old = job
    try:
        record = _unchanged(mask, old, rules) or _encode_mask(mask, rules)
        _check_size(mask, record, rules.photos_dir)
        return Outcome(mask.stem, record)
    except (UserError, OSError) as error:
        return Outcome(mask.stem, fault=str(error))


def _unchanged(mask: Path, old: dict[str, Any] | None, rules: Rules) -> dict[str, Any] | None:
    """The record of an earlier run, where it still holds."""
    encoded = rules.save_dir / f"{mask.stem}.png"
    if old is None or old["source"] != mask.name or not encoded.is_file():
        return None
    if encoded.stat().st_size != old["encoded_bytes"]:
        return None
    stamp = _stamp(mask)
    if {key: old[key] for key in stamp} == stamp:
        return old
    same = old["bytes"] == stamp["bytes"] and old["sha256"] == _sha256(mask)  # copied or touched
    return old | stamp if same else None


def _encode_mask(mask: Path, rules: Rules) -> dict[str, Any]:
    labels = read_labels(mask)
    counts = np.array(Image.fromarray(labels).histogram())  # twice as fast as bincount
    present = np.flatnonzero(counts)
    if unknown := [int(label) for label in present if label not in rules.allowed]:
        row, column = np.argwhere(labels == unknown[0])[0]
        raise UserError(
            f"{mask}: label {unknown[0]} at row {row}, column {column} ({counts[unknown[0]]} pixels) is no label "
            f"of the tree '{rules.tree}'" + (f"; nor are {unknown[1:]}" if unknown[1:] else "")
        )
    encoded = rules.staging / f"{mask.stem}.png"
    write_indexed(encoded, labels, rules.palette)
    return {
        "source": mask.name,
        **_stamp(mask),
        "sha256": _sha256(mask),
        "encoded_bytes": encoded.stat().st_size,
        "width": labels.shape[1],
        "height": labels.shape[0],
        "counts": {str(label): int(counts[label]) for label in present},
    }


def _check_size(mask: Path, record: dict[str, Any], photos_dir: Path) -> None:
    photo = find_file(photos_dir, mask.stem, PHOTO_SUFFIXES)
    width, height = photo_size(photo)
    if (width, height) != (record["width"], record["height"]):
        raise UserError(
            f"{mask}: is {record['width']}x{record['height']} (width x height), "
            f"its photo {photo.name} is {width}x{height}"
        )


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- the whole folder --------------------------------------------------------------------------------------


def _last_run(save_dir: Path, hierarchy: "Hierarchy") -> tuple[dict[str, Any], frozenset[str]]:
    """Id -> record, none where the last run used another tree or other colours; and the ids of all its maps."""
    try:
        record = json.loads((save_dir / RECORD).read_text(encoding="utf-8"))
        same = record["format"] == FORMAT and record["hierarchy"] == hierarchy.to_dict()
        return record["files"] if same else {}, frozenset(record["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, frozenset()


@contextlib.contextmanager
def _staging_folder(save_dir: Path) -> Iterator[Path]:
    """A folder for unfinished files, of one process at a time; what a killed one left there is cleared away.

    Raises: UserError where another process is at work, or the folder is of someone else.
    """
    staging = save_dir / STAGING
    staging.mkdir(exist_ok=True)
    if not (staging / LOCK).exists() and any(staging.iterdir()):
        raise UserError(f"{staging} is in the way: this program did not make it; move it elsewhere")
    with open(staging / LOCK, "a") as lock:
        if not try_lock(lock):
            raise UserError(f"{save_dir} is being written by another process; wait for its end, and run again")
        _clear(staging)
        try:
            yield staging
        finally:
            _clear(staging)
            (staging / LOCK).unlink(missing_ok=True)
            staging.rmdir()


def _clear(staging: Path) -> None:
    for path in staging.iterdir():
        if path.name != LOCK:
            path.unlink(missing_ok=True)


def _publish(
    records: dict[str, Any],
    old: dict[str, Any],
    known: frozenset[str],
    staging: Path,
    save_dir: Path,
    hierarchy: "Hierarchy",
) -> int:
    """Moves the new files to their place and writes encoding.json; returns how many files were new.

    `known` are the ids that the last run wrote; other PNGs are of a killed run or of the user, and kept.
    """
    fresh = sorted(staging.glob("*.png"))
    maps = [path for path in save_dir.glob("*.png") if path.name[0] != "."]
    if unknown := [path for path in maps if path.stem not in known]:
        _move_aside(unknown, save_dir.resolve())
    if records == old and not fresh:
        return 0
    (save_dir / RECORD).unlink(missing_ok=True)  # from here on the folder is a mixture
    for path in fresh:
        os.replace(path, save_dir / path.name)
    for sample_id in known.difference(records):
        (save_dir / f"{sample_id}.png").unlink(missing_ok=True)
    partial_record = staging / RECORD
    partial_record.write_text(_to_json(records, hierarchy), encoding="utf-8")
    os.replace(partial_record, save_dir / RECORD)
    return len(fresh)


def _move_aside(files: Sequence[Path], save_dir: Path) -> None:
    """Moves files into a new folder beside `save_dir`, and says so."""
    number = 1
    while (aside := save_dir.with_name(f"{save_dir.name}.old{number}")).exists():
        number += 1
    aside.mkdir()
    for path in files:
        shutil.move(path, aside / path.name)
    print(
        f"{save_dir} held {len(files)} PNGs that its {RECORD} does not list (the first: {files[0].name}), "
        f"of a killed run or of yours; moved to {aside}",
        file=sys.stderr,
    )


def _to_json(records: dict[str, Any], hierarchy: "Hierarchy") -> str:
    """encoding.json: short enough at its head to be read by people, one line a file."""
    counts = np.zeros((len(records), LABELS), np.int64)
    for row, record in zip(counts, records.values(), strict=True):
        for label, count in record["counts"].items():
            row[int(label)] = count
    content = {
        "format": FORMAT,
        "tree": hierarchy.name,
        "fingerprint": hierarchy.fingerprint,
        "masks": len(records),
        "paths": {
            name: [hierarchy.names[v] for v in path]
            for name, path in zip(hierarchy.names, hierarchy.paths, strict=True)
        },
        "nodes": {name: _node_counts(v, counts, hierarchy) for v, name in enumerate(hierarchy.names)},
        "ignored": {
            "pixels": int(counts[:, hierarchy.ignore_index].sum()),
            "photos": int((counts[:, hierarchy.ignore_index] > 0).sum()),
        },
        "hierarchy": hierarchy.to_dict(),
        "files": records,
    }
    lines = [f"  {json.dumps(key)}: {_one_a_line(value)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _one_a_line(value: Any) -> str:
    """JSON with the entries of an object on lines of their own."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n  }"


def _node_counts(node: int, counts: np.ndarray, hierarchy: "Hierarchy") -> dict[str, int]:
    """Shape: counts (files, labels)."""
    subtree = [v for v, path in enumerate(hierarchy.paths) if node in path]
    per_photo = counts[:, subtree].sum(1)
    return {
        "id": node,
        "pixels": int(per_photo.sum()),
        "labelled": int(counts[:, node].sum()),
        "photos": int((per_photo > 0).sum()),
    }


def _all_faults(faults: Sequence[str], total: int) -> str:
    shown = "\n  ".join(faults[:FAULTS_SHOWN])
    more = f"\n  and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    return f"{len(faults)} of {total} masks cannot be encoded; nothing was written:\n  {shown}{more}"
