"""Checkpoints: one `torch.save` archive (a zip) with all that a run needs, written so that a crash cannot damage it."""

import contextlib
import hashlib
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError, is_out_of_memory

FORMAT = 2  # raise it when an old file needs another reading; 1 had a checksum of its own behind the archive
NUMBERED = re.compile(r"checkpoint_(\d+)\.pt")
_CONTENT = {"format": int, "model": dict, "ema": dict | None, "config": dict, "tree": dict, "epoch": int}


class DamagedCheckpoint(UserError):
    """A checkpoint that is there and cannot be believed."""


def pack(state: dict) -> bytes:
    """The state as the bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(state | {"format": FORMAT}, buffer)
    return buffer.getvalue()


def load_checkpoint(path: str | Path) -> dict:
    """The state in a checkpoint, on the CPU. Nothing in the file is executed.

    Raises: UserError for a missing file, DamagedCheckpoint for one that is truncated, altered, or not ours.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint{_others(path.parent)}") from None
    except OSError as error:  # of the disk: the file may be whole
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many kinds for a damaged archive
        if is_out_of_memory(error):  # the file is whole
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds Python objects, which would run code"
        raise DamagedCheckpoint(f"{path}: truncated, damaged, or no checkpoint ({reason}); use another one") from None
    for key, kind in _CONTENT.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise DamagedCheckpoint(f"{path}: holds no usable {key!r}; expected a checkpoint written by train.py")
    if state["format"] > FORMAT:
        raise UserError(f"{path}: is of format {state['format']}, this version reads up to {FORMAT}")
    return state


def checkpoint_digest(path: Path) -> str | None:
    """The SHA-256 of a checkpoint's file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def newest_valid(folder: Path, say=print) -> Path | None:
    """The checkpoint to go on from: the newest one that is whole; None where none was written yet.

    Damaged ones are named, passed over and renamed, so that the next `last` does not push a whole `previous` out.
    Raises: DamagedCheckpoint when there are only such.
    """
    paths = _newest_first(folder)
    for i, path in enumerate(paths):
        try:
            load_checkpoint(path)
        except DamagedCheckpoint as error:
            say(f"{error}. Going back to the one before")
            continue
        with contextlib.suppress(OSError):
            for damaged in paths[:i]:
                damaged.rename(damaged.with_suffix(".damaged"))
        return path
    if paths:
        raise DamagedCheckpoint(f"{folder}: none of its {len(paths)} checkpoints is whole; start anew with --overwrite")
    return None


def keep_newest(folder: Path, keep: int) -> None:
    """Removes all but the `keep` numbered checkpoints written last; best, last and previous stay."""
    for path in [path for path in _newest_first(folder) if NUMBERED.fullmatch(path.name)][keep:]:
        path.unlink(missing_ok=True)


def find_checkpoint(name: str, folder: Path, root: Path) -> Path:
    """`best`, `last`, `checkpoint_7` or a path -> the file. Raises: UserError that lists what is there."""
    for path in (folder / f"{name}.pt", folder / name, root / os.path.expanduser(name), Path(name)):
        if os.path.isfile(path):  # False, too, for names that no file can have
            return path
    raise UserError(f"{name!r}: no such checkpoint{_others(Path(name) if os.path.isdir(name) else folder)}")


def find_model(name: str, root: Path) -> Path:
    """The best checkpoint of an experiment, by its name or folder; a folder of tools/export.py; or any other path."""
    if os.path.isfile(Path(name) / "model.safetensors"):
        return Path(name)
    for folder in (root / "experiments" / name, Path(name)):
        if os.path.isfile(folder / "models_checkpoints" / "best.pt"):
            return folder / "models_checkpoints" / "best.pt"
    return find_checkpoint(name, root / "experiments", root)


def _newest_first(folder: Path) -> list[Path]:
    """`last`, then all others by the time they were written."""
    paths = list(folder.glob("*.pt"))
    return sorted(paths, key=lambda path: (path.name == "last.pt", path.stat().st_mtime_ns), reverse=True)


def _others(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.pt")) if folder.is_dir() else []
    return f"; {folder} holds {', '.join(names[-8:]) or 'no checkpoints'}"
