"""Which file belongs to which id: id lists, and the photos of a folder or of the folders below it."""

import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.files import write_whole
from utils.images import MASK_SUFFIXES, PHOTO_SUFFIXES

SUFFIX = "|".join({*PHOTO_SUFFIXES, *MASK_SUFFIXES}).replace(".", "")
NO_NAME = re.compile(rf'^\.|[/\\:"\t]|  |\.({SUFFIX})$', re.IGNORECASE)
PHOTO_ENDING = "_leftImg8bit"  # Cityscapes: part of the file's name, not of the id


def read_ids(path: str | Path) -> list[str]:
    """The ids of a list file, one a line, in order; UTF-8 or UTF-16, CRLF and blank lines are let pass.

    Raises: UserError naming the file and the line of an id that is repeated or that is no plain file name.
    """
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "the id file").split("\n"), start=1):
        sample_id = same_form(line.strip())
        if sample_id in line_of:
            raise UserError(f"{path}, line {number}: id {sample_id!r} is already on line {line_of[sample_id]}")
        if not sample_id:
            continue
        if NO_NAME.search(sample_id) or not sample_id.isprintable() or len(sample_id.encode()) > 200:
            raise UserError(
                f"{path}, line {number}: id {sample_id!r} is no plain name of a photo, without folder and suffix; "
                "write one id a line and nothing else"
            )
        line_of[sample_id] = number
    if not line_of:
        raise UserError(f"the id file {path} is empty; it should hold one photo id a line")
    return list(line_of)


def write_ids(ids: Iterable[str], path: str | Path) -> None:
    """Writes a list file, one id a line. Raises: OSError."""
    write_whole("".join(f"{sample_id}\n" for sample_id in ids), path)


def read_text(path: str | Path, what: str) -> str:
    """A text that people wrote: UTF-8, or UTF-16 as Windows writes it. Raises: UserError."""
    try:
        data = Path(path).read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{what} {path} cannot be read as text: {error}; expected UTF-8") from error


def same_form(name: str) -> str:
    """One Unicode form for all names: disks of a Mac write an accent apart from its letter, lists do not."""
    return unicodedata.normalize("NFC", name)


def draw_split(ids: Iterable[str], share: float, seed: int) -> dict[str, list[str]]:
    """The ids cut into train and val, `share` of them val; the order of `ids` does not matter.

    Raises: UserError for fewer than two.
    """
    ids = sorted(ids)
    if len(ids) < 2:
        raise UserError(f"a train and a val split need two photos, there are {len(ids)}")
    n_val = min(max(1, round(len(ids) * share)), len(ids) - 1)
    val = {*random.Random(seed).sample(ids, n_val)}
    return {"train": [i for i in ids if i not in val], "val": sorted(val)}


class PhotoFolder:
    """The photos of a folder by id; where the folder itself holds none, those of the folders below it.

    Raises: UserError where the folder is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.paths = Path(folder), {}
        for path in files_below(folder, PHOTO_SUFFIXES):
            self.paths.setdefault(same_form(path.stem).removesuffix(PHOTO_ENDING), []).append(path)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self.paths

    def find(self, sample_id: str) -> Path:
        """The photo of an id. Raises: UserError where there is none, or several."""
        found = self.paths.get(sample_id, ())
        if len(found) > 1:
            raise UserError(f"id '{sample_id}' has several photos, {', '.join(map(str, found[:3]))}; keep one")
        if not found:
            raise UserError(f"no file for id '{sample_id}' in {self.folder}; looked for {', '.join(PHOTO_SUFFIXES)}")
        return found[0]


def files_below(folder: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of these suffixes in a folder, sorted; where it holds none, those of the folders below it.

    Raises: UserError where the folder is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist")
    for paths in (folder.glob("*"), folder.rglob("*")):
        found = (path for path in paths if path.suffix.lower() in suffixes)
        if kept := sorted(path for path in found if "/." not in f"/{path.relative_to(folder).as_posix()}"):
            if odd := [path for path in kept if not str(path).isascii() and re.search("[\ud800-\udfff]", str(path))]:
                raise UserError(f"{odd[0]!r}: its name is not UTF-8; rename it")
            return kept  # none of the hidden ones
    return []
