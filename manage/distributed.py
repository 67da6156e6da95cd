"""One process or many: the same calls, which do nothing when there is one."""

import os
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError


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
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "mps":
        raise UserError("key 'device': mps has no numbers of 64 bits, in which losses and scores are summed; use cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        device = device if device.index is not None else torch.device("cuda", local_rank)
        if device.index >= count:
            raise UserError(f"key 'device': {name!r} is not there (this machine has {count} GPUs); use auto or cpu")
    return device


def means_lost_process(error: BaseException) -> bool:
    """Whether a collective call failed since another process has ended or hangs; gloo says so only in words."""
    signs = "connection (closed|reset|refused)|broken pipe|timed out waiting"
    in_words = isinstance(error, RuntimeError) and re.search(signs, str(error), re.IGNORECASE) is not None
    return dist.is_initialized() and (isinstance(error, dist.DistError) or in_words)
