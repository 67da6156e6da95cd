"""One process at a time in a folder, on all systems that `filelock` knows."""

import contextlib
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.files import read_json, write_json

PATIENCE_S = 8  # loader processes share the lock of a killed training, and notice within 5 seconds that it is gone


class Lock:
    """The lock of a folder. The kernel's, so it goes with its processes however they end; a file beside it names them.

    Raises: UserError from `take` when another process holds it; OSError when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.signature = folder, folder / ".owner.json"
        self.lock = FileLock(folder / ".lock")

    def take(self, take_over: bool = False) -> None:
        """Locks the folder; with `take_over` from another host, too, whose process may be running still."""
        owner, host = self._owner(), socket.gethostname()
        who = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}" if owner else "another"
        is_here = bool(owner) and owner.get("host") == host
        if owner and not is_here and not take_over:  # file locks need not reach across hosts
            raise UserError(
                f"{self.folder} was locked by {who}. If that one is gone, take its lock over: --take-over; "
                "if it still runs, both would write here"
            )
        try:
            self.lock.acquire(timeout=PATIENCE_S if is_here and not _is_alive(owner.get("pid")) else 0)
        except Timeout:
            raise UserError(f"{self.folder} is in use by {who}; wait for it, stop it, or choose another name") from None
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
                raise
            raise UserError(
                f"{self.folder}/.lock: cannot be locked ({error.strerror}); use a folder on a disk that knows locks"
            ) from None
        if owner:
            print(f"the lock of {who} is taken over")
        write_json(
            {"host": host, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, self.signature, None
        )

    def release(self) -> None:
        if self.lock.is_locked:
            with contextlib.suppress(OSError):  # the folder may be gone
                self.signature.unlink(missing_ok=True)
            self.lock.release()

    def is_held(self) -> bool:
        """Whether another process holds it now."""
        try:
            with self.lock.acquire(timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # no folder, or no lock can be had here
            return False

    def _owner(self) -> dict:
        if not self.signature.is_file():
            return {}
        try:
            owner = read_json(self.signature)
        except UserError:  # written this moment, or by nobody
            return {}
        return owner if isinstance(owner, dict) else {}


def _is_alive(pid) -> bool:
    """Whether a process of this host runs; in doubt, True."""
    if os.name == "nt":  # there a signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError):
        return True
    return True
