"""One process or many: the same calls, which do nothing when there is one."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Around all that an entry point does: leaves the process group, and says what went wrong once, not once a process.

    A process that fails ends the others: their next collective call breaks, and so does the run, at once.
    """
    try:
        yield
    except UserError:
        if not _speaks_first():
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if not (dist.is_initialized() and _means_lost_process(error)):
            raise
        if not _speaks_first():
            raise SystemExit(2) from None
        raise UserError(
            "a process of this run is gone (its own message, if it had one, stands above), so the others end too; "
            "the newest checkpoint stands, and a training goes on from it with --resume"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start(device: torch.device) -> None:
    """Joins the process group that torchrun describes: tensors on GPUs meet by NCCL, all others by gloo."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if is_launched() and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
        )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Adds up each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrites each tensor with that of the main process."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(value) -> list:
    """The value of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def on_main_only(action, *args):
    """The result of `action` in the main process, None in the others; a `UserError` there is raised in all."""
    result, fault = None, None
    if is_main():
        try:
            result = action(*args)
        except UserError as error:
            fault = str(error)
    if dist.is_initialized():
        shared = [fault]
        dist.broadcast_object_list(shared)
        fault = shared[0]
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


def agree(wish: bool) -> bool:
    """What the main process wishes, in all processes."""
    return bool(largest(int(wish and is_main())))


def choose_device(name: str) -> torch.device:
    """The device of this process.

    Raises: UserError when it is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index if device.index is not None else local_rank
        if index >= count:
            raise UserError(f"key 'device': {name!r} is not there (this machine has {count} GPUs); use auto or cpu")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("key 'device': 'mps' is not there; use auto or cpu")
    return device


def _speaks_first() -> bool:
    """Whether no other process of this run has told of a fault yet; in doubt, True.

    Asks the store that torchrun keeps, which is there before the process group and outlives every process of it.
    """
    if not is_launched():
        return True
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"hseg/faults/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True  # better twice than not at all


def _means_lost_process(error: RuntimeError) -> bool:
    """Whether a collective call failed since another process has ended; gloo says so only in words."""
    signs = ("connection closed", "connection reset", "broken pipe", "connection refused", "timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)
