"""What ended a run: in one line, told once, not once a process."""

import contextlib
import json
import os
import re
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from configs.config import Config
from manage.distributed import is_launched, means_lost_process
from utils.errors import UserError


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Around all that an entry point does: of several processes the first that fails tells why, and all end.

    A process that fails ends the others: their next collective call breaks, and so does the run, at once.
    """
    try:
        yield
    except (UserError, RuntimeError) as error:
        if means_lost_process(error):
            error = UserError(
                "a process of this run is gone or hangs, so the others end too; the newest checkpoint stands, and a "
                "training goes on from it with --resume"
            )
        if not isinstance(error, UserError):
            raise
        if is_launched():
            _tell_once(error)
        raise error from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _tell_once(error: UserError) -> None:
    """Ends silently where another process tells of its fault, and where torchrun's report, which comes last, does."""
    report, restart = os.environ.get("TORCHELASTIC_ERROR_FILE"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_first = True  # in doubt: better twice than not at all
    with contextlib.suppress(KeyError, ValueError, RuntimeError):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's store is there before the process group and outlives every process of it
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        is_first = store.add(f"hseg/faults/{restart}", 1) == 1
    if is_first and report:  # a second ago, so that the report takes it for the cause of all
        message = {"message": f"\nerror: {error}", "extraInfo": {"timestamp": int(time.time()) - 1}}
        Path(report).write_text(json.dumps({"message": message}), encoding="utf-8")
    if report or not is_first:
        raise SystemExit(2) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the machine; CPU allocators say so only in words."""
    signs = "(not enough|n't allocate|not allocate) memory"
    in_words = isinstance(error, RuntimeError | OSError) and re.search(signs, str(error), re.IGNORECASE) is not None
    return in_words or isinstance(error, torch.OutOfMemoryError | MemoryError)


def one_line(error: Exception, config: Config, where: str) -> str:
    """What went wrong and what to do; the traceback of what nobody foresaw goes to a file in the experiment."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"{where}: out of memory at batch_size {config.batch_size} and crop_size {config.crop_size}; lower "
            "batch_size (with a larger accumulate a step keeps its photos), crop_size or short_side"
        )
    file, reason = config.experiment_dir / "traceback.txt", (str(error).splitlines() or [""])[0]
    with contextlib.suppress(OSError):
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{where}: {type(error).__name__}: {reason} (see {file})"
