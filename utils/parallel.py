"""Runs one function over many items on all cores, with a progress bar."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from utils.cli import progress
from utils.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_WORTH_A_POOL = 48  # starting the workers takes about as long as this many items


def map_with_progress(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, workers: int | None = None
) -> list[Result]:
    """`[function(item) for item in items]`, in order; `function` must be importable (no lambda, no closure).

    `workers` None: as many as there are cores.

    Raises: UserError when a worker process was killed.
    """
    bar = progress(total=len(items), desc=description, unit="file", disable=not items)
    workers = min(workers or _available_cores(), len(items) // _WORTH_A_POOL)
    results = []
    with bar:
        if workers < 2:
            for item in items:
                results.append(function(item))
                bar.update()
            return results
        # Not fork: it copies locks that threads of torch or numpy may hold.
        # Not multiprocessing.Pool: it waits for ever for a worker that was killed.
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                for result in pool.map(function, items, chunksize=8):
                    results.append(result)
                    bar.update()
        except BrokenProcessPool:
            raise UserError(
                f"{description}: a worker process was killed, perhaps for want of memory; free some, and run again"
            ) from None
    return results


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
