"""A child process that dies or fails at a named point, told by Python's own audit events: no module is changed.

    train(root, data, status=-SIGKILL, prepare=[(kill_at, "os.rename", "*/last.pt", 2)])

dies just before it renames anything to or from last.pt for the second time. Events: "open" (files, and folders that
are synced), "os.rename" (os.replace too), "os.remove", ... as in Python's table of audit events.
"""

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch


def kill_at(event: str, pattern: str, number: int = 1) -> None:
    """From here on this process kills itself before its `number`-th event on a path that fits the pattern."""
    _at(event, pattern, number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_at(event: str, pattern: str, number: int = 1, fault: int = errno.ENOSPC) -> None:
    """From here on the `number`-th such event fails: the disk is full, or what else `fault` says."""

    def fail() -> None:
        raise OSError(fault, os.strerror(fault))

    _at(event, pattern, number, fail)


def before_step(number: int, action: Callable, *arguments) -> None:
    """From here on this process calls the action before it trains the step of that number, counted from 0."""
    from manage.train_manager import TrainManager

    step = TrainManager.train_step

    def with_action(self, group):
        if self.step == number:
            action(*arguments)
        return step(self, group)

    TrainManager.train_step = with_action


def wait_until_there(place: str) -> None:
    print("waiting", flush=True)
    while not os.path.exists(place):
        time.sleep(0.02)


def kill_half_written(size: int) -> None:
    """From here on the kernel kills this process when it writes a file beyond `size` bytes; `size` are on disk then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would go on with an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _at(event: str, pattern: str, number: int, action: Callable[[], None]) -> None:
    seen = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        paths = [argument for argument in arguments if isinstance(argument, str | os.PathLike)]
        if name == event and any(fnmatch(os.fspath(path), pattern) for path in paths):
            seen += 1
            if seen == number:
                action()

    sys.addaudithook(hook)
