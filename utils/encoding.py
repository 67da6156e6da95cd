"""encoding.json: what the label maps of a data set hold, and whether they are still those of its masks."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.encoder import FORMAT, KEYS, RECORD
from utils.errors import UserError
from utils.files import read_json
from utils.hierarchy import Hierarchy
from utils.label_map import is_same

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
    labelled: tuple[int, ...]  # of the node itself
    photos: tuple[int, ...]  # with a pixel of the node or its descendants
    ignored: int  # pixels

    @property
    def ids(self) -> Collection[str]:
        return self.files.keys()


def load_encoding(labels_dir: str | Path, hierarchy: Hierarchy) -> Encoding:
    """The encoding of a folder of label maps.

    Raises: UserError where it is missing, not complete, damaged or made with another tree.
    """
    path = Path(labels_dir) / RECORD
    if not path.is_file():
        raise UserError(f"{path} does not exist: the masks are not encoded yet; {AGAIN}")
    try:
        record = read_json(path)
        if record["format"] != FORMAT:
            raise UserError(f"{path} is of format {record['format']}, this program reads {FORMAT}; {AGAIN}")
        if not record["complete"]:
            raise UserError(f"{path} says that encoding did not come to its end; {AGAIN}")
        _check_tree(record, hierarchy, f"{path} {{}}; {AGAIN}, or choose the tree it was made with")
        if any(KEYS - old.keys() for old in record["files"].values()):
            raise KeyError("files")
        nodes = [record["nodes"][name] for name in hierarchy.names]
        return Encoding(
            files=dict(record["files"]),
            skipped=dict(record["skipped"]),
            folder=Path(labels_dir),
            masks_dir=_first_folder([os.path.normpath(os.path.join(labels_dir, at)) for at in record["masks_dir"]]),
            obey_exif=record["obey_exif"],
            ignored=int(record["ignored"]["pixels"]),
            **{key: tuple(int(node[key]) for node in nodes) for key in ("pixels", "labelled", "photos")},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error


def _first_folder(places: list[str]) -> Path:
    return Path(next(filter(os.path.isdir, places), places[0]))


def _check_tree(record: dict[str, Any], hierarchy: Hierarchy, message: str) -> None:
    if record["fingerprint"] != hierarchy.fingerprint:
        same_name = record["tree"] == hierarchy.name
        fault = f"was made with the tree '{record['tree']}'"
        fault += ", which has changed since" if same_name else f", this experiment uses '{hierarchy.name}'"
        raise UserError(message.format(fault))
    theirs = record["hierarchy"]["ignore_index"]
    if theirs != hierarchy.ignore_index:
        raise UserError(message.format(f"has ignore_index {theirs}, the tree has {hierarchy.ignore_index}"))


def check_encoded(
    encoding: Encoding, ids: Collection[str], source: Path, obey_exif: bool | None = None, tolerate: int = 0
) -> None:
    """Holds ids (of the list `source`) against what was encoded, and their masks against what these were then.

    Size and time are compared, and the content only where the time alone differs: a copy is no change. A folder of
    masks that is gone as a whole is let pass. So many ids are tolerated that encoding left out (--skip-faulty).

    Raises: UserError for ids without a label map, masks that have changed or are gone, EXIF read otherwise.
    """
    if None not in (obey_exif, encoding.obey_exif) and obey_exif != encoding.obey_exif:
        raise UserError(f"key 'obey_exif': is {obey_exif}, the masks were encoded with {encoding.obey_exif}; {AGAIN}")
    unknown = [sample_id for sample_id in ids if sample_id not in encoding.files]
    skipped = [sample_id for sample_id in unknown if sample_id in encoding.skipped]
    if unknown and (len(skipped) < len(unknown) or len(skipped) > tolerate):
        first = (skipped or unknown)[0]
        without = f"; or set skip_unreadable to {len(skipped)}, to go on without them" if skipped == unknown else ""
        raise UserError(
            f"{source}: {len(unknown)} of {len(ids)} ids have no label map in {encoding.folder} (the first: {first}; "
            f"when it was encoded, {encoding.skipped.get(first, 'it had no mask')}). Mend their masks and encode "
            "again: python tools/dataset_hie_enc.py (with the --cfg of this experiment); or take the ids from the "
            f"list, which holds one id a line and nothing else{without}"
        )
    if not encoding.masks_dir.is_dir():
        return
    known = {sample_id: encoding.files[sample_id] for sample_id in ids if sample_id in encoding.files}
    if stale := {i: change for i, old in known.items() if (change := _change(encoding.masks_dir, old))}:
        first = next(iter(stale))
        raise UserError(
            f"{len(stale)} masks in {encoding.masks_dir} are not those that were encoded (the first: that of {first} "
            f"{stale[first]}); {AGAIN}"
        )


def _change(masks_dir: Path, old: dict[str, Any]) -> str:
    try:  # joined as text: a Path would take longer than the look at the disk
        return "" if is_same(os.path.join(masks_dir, old["source"]), old) else "has changed"
    except OSError:
        return "is gone"
