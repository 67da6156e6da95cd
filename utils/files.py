"""Files that are whole or not there, names that nothing is lost under, and strict JSON. Standard library only."""

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError


def write_whole(data: bytes | str, path: str | Path, previous: Path | None = None, sync: bool = True) -> None:
    """Writes beside, flushes to disk, renames: at every moment `path` is the old file or the new one, never half.

    `previous` is where the old file goes; for a moment there is then no `path`, but always one of the two.
    Without `sync` a power cut may leave it cut short: for files in thousands that can be made again.
    Raises: OSError when the disk is full or not writable; the old file then stands.
    """
    path = Path(path)
    beside = path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if previous is not None and path.is_file():
            os.replace(path, previous)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder itself may be gone
            beside.unlink(missing_ok=True)
        raise
    if sync:
        with contextlib.suppress(OSError):  # network disks and Windows cannot bring a rename to the disk, and need not
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of `write_whole`; call it while no other process writes there."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` (absent or empty until then) if all goes well. Raises: UserError."""
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of a killed run
    try:
        if folder.exists():
            folder.rmdir()
        beside.mkdir(parents=True)
        yield beside
        beside.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; empty it, or choose another --out") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def set_aside(*paths: Path) -> list[Path]:
    """Renames those of the paths that exist to free names, `<name>.old-<time>`; returns these. Raises: OSError."""
    there, stamp = [path for path in paths if os.path.lexists(path)], time.strftime("%Y%m%d-%H%M%S")
    for again in itertools.count(1):
        ending = stamp if again == 1 else f"{stamp}-{again}"
        aside = [path.with_name(f"{path.name}.old-{ending}") for path in there]
        if not any(map(os.path.lexists, aside)):
            break
    return [path.rename(name) for path, name in zip(there, aside, strict=True)]


# ---- JSON ------------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """Strict JSON: no duplicate keys, no NaN. Raises: UserError naming the file, and the line of the mistake."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        near = sorted(found.name for found in Path(path).parent.glob("*.json"))[:8]
        raise UserError(f"{path}: {error.strerror.lower()}; JSON files there: {', '.join(near) or 'none'}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def parse_json(text: str) -> Any:
    """As `read_json`, of a text. Raises: ValueError."""
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def write_json(value: Any, path: str | Path, indent: int | None = 2) -> None:
    """Writes JSON whole. Raises: OSError."""
    write_whole(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", path)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in the object named {values.get('name', '?')!r}; keep one")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
