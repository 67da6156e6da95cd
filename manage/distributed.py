"""One process or many: the same calls, which do nothing when there is one."""

import contextlib
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.config import Config
from utils.errors import UserError, is_out_of_memory


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(device: torch.device, timeout_minutes: float = 10.0) -> None:
    """Joins the process group that torchrun describes: tensors on GPUs meet by NCCL, all others by gloo.

    Who waits for another process longer than the timeout ends with an error.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if is_launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Adds up each tensor over all processes, in place."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrites each tensor with that of the main process."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.broadcast(tensor, src=0)


def gather(value) -> list:
    """The value of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def on_main_only(action: Callable, *args) -> Any:
    """The result of `action`, which the main process alone calls, in all processes.

    Raises: UserError in all, for a UserError there, or a file that cannot be written.
    """
    result, fault = None, None
    try:
        result = action(*args) if is_main() else None
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = f"{error.filename}: cannot be written ({error.strerror}); set root_dir to a folder you may write to"
    result, fault = gather((result, fault))[0]
    if fault is not None:
        raise UserError(fault)
    return result


def largest(value: int) -> int:
    """The largest value of all processes."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)  # on the CPU: no GPU is made to wait
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def choose_device(name: str) -> torch.device:
    """The device of this process. Raises: UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device {name!r}: expected auto, cpu, cuda or cuda:<number>")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and device.index >= count:
        raise UserError(f"key 'device': {name!r} is not there (this machine has {count} GPUs); use auto or cpu")
    return device


def means_lost_process(error: BaseException) -> bool:
    """Whether a collective call failed since another process has ended or hangs; gloo says so only in words."""
    signs = "connection (closed|reset|refused)|broken pipe|timed out waiting"
    in_words = isinstance(error, RuntimeError) and re.search(signs, str(error), re.IGNORECASE) is not None
    return dist.is_initialized() and (isinstance(error, dist.DistError) or in_words)


# --- what ended a run: in one line, told once, not once a process ---
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
