"""What every entry point shares: a user's mistake becomes one line on stderr and exit status 2; bars of progress."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from utils.errors import UserError, is_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    except (MemoryError, RuntimeError, OSError) as error:
        reason = "out of memory; end other work on this machine, or ask for less (see --help)"
        if not is_out_of_memory(error):
            if not isinstance(error, OSError) or error.strerror is None:
                raise
            reason = f"{error.filename or 'a file'} cannot be read or written ({error.strerror})"
        print(f"error: {reason}", file=sys.stderr)
        status = 2
    sys.exit(status or 0)


def duration(seconds: float) -> str:
    """In words, such as `3 h 20 min`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def progress(items: Iterable | None = None, **options) -> tqdm:
    """tqdm on stderr; none where that is no terminal, so that a log file holds no fragments of bars."""
    return tqdm(items, mininterval=0.2, **options | {"disable": options.get("disable") or None})


def cores() -> int:
    """Cores this process may use, which on shared machines is less than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_files(function: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
    """`[function(item) for item in items]`, in threads: what reads and writes pictures lets others run meanwhile."""
    with ThreadPoolExecutor(cores()) as pool:
        done = pool.map(function, items)
        return list(progress(done, total=len(items), desc=what, unit="file", disable=not items))
