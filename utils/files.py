"""Files that are whole or not there, names that nothing is lost under, and strict JSON. Standard library only."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError

UNFINISHED = ".*.part"  # what a killed process may leave of `write_whole`
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOSYS}


def write_whole(data: bytes | str, path: str | Path, previous: Path | None = None, sync: bool = True) -> None:
    """Writes beside, flushes to disk, renames: at every moment `path` is the old file or the new one, never half.

    `previous` is where the old file goes; for a moment there is then no `path`, but always one of the two.
    Without `sync` a power cut may leave it cut short: for files in thousands that can be made again.
    Raises: OSError when the disk is full or not writable; the old file then stands.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
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
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings a rename to the disk, where the file system can: network disks and Windows cannot, and need not."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes had begun to write; call it while no other process writes there."""
    for path in folder.glob(UNFINISHED):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` (absent or empty until then) if all goes well. Raises: OSError."""
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}.part")
    if folder.exists():
        folder.rmdir()
    shutil.rmtree(beside, ignore_errors=True)  # of a killed run
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def names_aside(paths: Sequence[Path]) -> list[Path]:
    """A free name beside each path, `<name>.old-<time>`, with the same ending for all."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    endings = itertools.chain([stamp], (f"{stamp}-{i}" for i in itertools.count(2)))
    ending = next(e for e in endings if not any(os.path.lexists(_aside(path, e)) for path in paths))
    return [_aside(path, ending) for path in paths]


def set_aside(*paths: Path) -> list[Path]:
    """Renames those of the paths that exist to names that are free; returns these. Raises: OSError."""
    there = [path for path in paths if os.path.lexists(path)]
    return [path.rename(aside) for path, aside in zip(there, names_aside(there), strict=True)]


def _aside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.old-{ending}")


# ---- JSON ------------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """Strict JSON: no duplicate keys, no NaN.

    Raises: UserError naming the file, and the line of the mistake.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbours(Path(path))}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from None
    except ValueError as error:  # UnicodeDecodeError, or a zero byte in the path
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a config or a tree") from None
    except ValueError as error:
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


def _neighbours(path: Path) -> str:
    """The files of that kind that do exist there, for someone who mistyped a name."""
    try:
        names = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))
    except (OSError, ValueError):
        names = []
    return f"; {path.parent} holds {', '.join(names[:8])}" if names else ""
