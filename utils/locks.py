"""One process at a time in a folder, on all systems that `filelock` knows."""

import contextlib
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.files import read_json, write_json


class Lock:
    """The lock of a folder. The kernel's, so it goes with its process however it ends; a file beside it names it.

    Raises: UserError from `take` when another process holds it; OSError when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.signature = folder, folder / ".owner.json"
        self.lock = FileLock(folder / ".lock")

    def take(self, take_over: bool = False) -> None:
        """Locks the folder; with `take_over` from another host, too, whose process may be running still."""
        owner, host = self._owner(), socket.gethostname()
        who = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}" if owner else "another"
        if owner and owner.get("host") != host and not take_over:  # file locks need not reach across hosts
            raise UserError(
                f"{self.folder} was locked by {who}. If that one is gone, take its lock over: --take-over; "
                "if it still runs, both would write here"
            )
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.folder} is in use by {who}; wait for it, stop it, or choose another name") from None
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be locked ({error.strerror}); use another disk") from None
        if owner:
            print(f"the lock of {who} is taken over")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json({"host": host, "pid": os.getpid(), "since": now}, self.signature)

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
        with contextlib.suppress(UserError, TypeError, ValueError):  # none, written this moment, or by nobody
            return dict(read_json(self.signature))
        return {}
