"""The kernel's file locks, which go with their process however that ends."""

import fcntl
import os
from typing import IO


def try_lock(file: IO) -> bool:
    """Locks an open file for this process; False where another holds it, or has just removed the file.

    A POSIX lock: child processes do not inherit it.
    Raises: OSError where the file system cannot lock.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return os.fstat(file.fileno()).st_nlink > 0
