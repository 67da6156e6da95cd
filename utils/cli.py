"""What every entry point shares: a user's mistake becomes one line on stderr and exit status 2; bars of progress."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import TextIO, TypeVar

from tqdm import tqdm

from utils.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_WORTH_A_POOL = 48  # starting a worker takes about as long as this many files


def run_main(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a `UserError` prints its message alone."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # before a run that could be saved
        status = 130
    except BrokenPipeError:  # the reader of our output went away (| head)
        status = 1
    sys.exit(status or 0)


def duration(seconds: float) -> str:
    """In words, such as `3 h 20 min`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def progress(items: Iterable | None = None, **options) -> tqdm:
    """tqdm on stderr; where that is no terminal, a whole line every half minute instead of ten times a second."""
    if sys.stderr.isatty():
        return tqdm(items, mininterval=0.2, **options)
    line = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {elapsed}, {remaining} left{postfix}"
    return tqdm(items, **{"mininterval": 30, "delay": 30, "bar_format": line, "file": _Lines(sys.stderr)} | options)


def cores() -> int:
    """Cores this process may use, which on shared machines is less than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_files(
    function: Callable[[Item], Result], items: Sequence[Item], what: str, workers: int | None = None
) -> list[Result]:
    """`[function(item) for item in items]`, in order, on all cores; `function` must be importable.

    Raises: UserError when a worker process was killed.
    """
    workers = min(workers or cores(), len(items) // _WORTH_A_POOL)
    bar = {"desc": what, "unit": "file", "disable": not items}
    if workers < 2:
        return [function(item) for item in progress(items, **bar)]
    # Not fork, which is all that tqdm's process_map can: its children copy locks that threads may hold, and when their
    # parent is killed they live on with its lock on the files.
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
            return list(progress(pool.map(function, items, chunksize=8), total=len(items), **bar))
    except BrokenProcessPool:
        raise UserError(
            f"{what}: a worker process was killed, perhaps for want of memory; free some, and run again"
        ) from None


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for its next item for ever."""
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class _Lines:
    """A log file for tqdm, which paints over its line: whole lines instead."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if words := text.replace("\x1b[A", "").strip("\r\n "):  # without moves of the cursor
            self.stream.write(words + "\n")

    def flush(self) -> None:
        self.stream.flush()
