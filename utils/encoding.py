"""encoding.json: what the label maps of a data set hold, and whether they are still those of its masks."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json
from utils.hierarchy import Hierarchy

RECORD, FORMAT = "encoding.json", 3
KEYS = {"source", "photo", "bytes", "mtime_ns", "sha256", "encoded_bytes", "counts"}  # of each mask
AGAIN = "run: python tools/dataset_hie_enc.py (with the --cfg of this experiment)"


@dataclass(frozen=True)
class Encoding:
    """What encoding.json says: of each id, and per node of the tree (in its order) how much there is of it."""

    files: dict[str, dict[str, Any]]
    skipped: dict[str, str]  # id -> what is wrong with it
    folder: Path
    masks_dir: Path
    obey_exif: bool | None
    pixels: tuple[int, ...]  # of the node and its descendants
    photos: tuple[int, ...]  # with a pixel of the node or its descendants
    total: int  # pixels, void among them


def load_encoding(labels_dir: str | Path, hierarchy: Hierarchy) -> Encoding:
    """The encoding of a folder of label maps.

    Raises: UserError where it is missing, not complete, damaged or made with another tree.
    """
    path = Path(labels_dir) / RECORD
    if not path.is_file():
        raise UserError(f"{path} does not exist: the masks are not encoded yet; {AGAIN}")
    try:
        record = read_json(path)
        if record["format"] != FORMAT or not record["complete"]:
            raise UserError(f"{path} is of another format, or encoding did not come to its end; {AGAIN}")
        theirs = Hierarchy.from_dict(record["hierarchy"], str(path))
        if theirs.fingerprint != hierarchy.fingerprint or theirs.ignore_index != hierarchy.ignore_index:
            made, used = (f"'{h.name}' ({h.num_nodes} nodes, void {h.ignore_index})" for h in (theirs, hierarchy))
            raise UserError(
                f"{path} was made with the tree {made}, this experiment uses {used}: their ids, names or parents "
                f"differ; {AGAIN}, or choose the tree it was made with"
            )
        if any(KEYS - old.keys() for old in record["files"].values()):
            raise KeyError("files")
        return Encoding(
            files=dict(record["files"]),
            skipped=dict(record["skipped"]),
            folder=Path(labels_dir),
            masks_dir=Path(labels_dir, record["masks_dir"]),
            obey_exif=record["obey_exif"],
            **_totals(record["files"], hierarchy),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error


def _totals(files: dict[str, dict[str, Any]], hierarchy: Hierarchy) -> dict[str, Any]:
    """All pixels, and per node those at or below it and the photos with any."""
    pixels, photos, total = Counter(), Counter(), 0
    paths = dict(enumerate(hierarchy.paths)) | {hierarchy.ignore_index: ()}
    for record in files.values():
        counts = {int(label): int(count) for label, count in record["counts"].items()}
        total += sum(counts.values())
        photos.update({node for label in counts for node in paths[label]})
        for label, count in counts.items():
            pixels.update(dict.fromkeys(paths[label], count))
    nodes = range(hierarchy.num_nodes)
    return {"pixels": tuple(pixels[v] for v in nodes), "photos": tuple(photos[v] for v in nodes), "total": total}


def check_encoded(
    encoding: Encoding, ids: Collection[str], source: Path, obey_exif: bool | None = None, tolerate: int = 0
) -> None:
    """Holds ids (of the list `source`) against what was encoded, and their masks against what these were then.

    A folder of masks that is gone as a whole is let pass. So many ids are tolerated that --skip-faulty left out.

    Raises: UserError for ids without a label map, masks that have changed or are gone, EXIF read otherwise.
    """
    if None not in (obey_exif, encoding.obey_exif) and obey_exif != encoding.obey_exif:
        raise UserError(f"key 'obey_exif': is {obey_exif}, the masks were encoded with {encoding.obey_exif}; {AGAIN}")
    unknown = [sample_id for sample_id in ids if sample_id not in encoding.files]
    skipped = [sample_id for sample_id in unknown if sample_id in encoding.skipped]
    if len(unknown) > (tolerate if skipped == unknown else 0):
        first = (skipped or unknown)[0]
        raise UserError(
            f"{source}: {len(unknown)} of {len(ids)} ids have no label map in {encoding.folder} (the first: {first}; "
            f"when it was encoded, {encoding.skipped.get(first, 'it had no mask')}). Mend the masks and {AGAIN}; or "
            "take the ids from the list; or, where --skip-faulty left them out, let skip_unreadable allow as many"
        )
    if not encoding.masks_dir.is_dir():
        return
    stale = [i for i in ids if i in encoding.files and not is_same(encoding.masks_dir, encoding.files[i])]
    if stale:
        raise UserError(
            f"{len(stale)} masks in {encoding.masks_dir} are not those that were encoded (the first: that of "
            f"{stale[0]} has changed or is gone); {AGAIN}"
        )


def is_same(masks_dir: Path, old: dict[str, Any]) -> bool:
    """Whether a mask is what it was by size and time, or else by its content: a copy is no change."""
    mask = os.path.join(masks_dir, old["source"])  # a Path would take longer than the look at the disk
    try:
        now = stamp(mask)
        is_untouched = now["mtime_ns"] == old["mtime_ns"]
        return now["bytes"] == old["bytes"] and (is_untouched or sha256(mask) == old["sha256"])
    except OSError:
        return False


def stamp(path: str | Path) -> dict[str, int]:
    stat = os.stat(path)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
