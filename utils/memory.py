"""What of the machine's memory is free for photos, and the way of their bytes to the device."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Bytes on the device, in one copy that nothing waits for; a photo keeps its channels interleaved.

    Shape: (3, h, w) or (h, w) uint8 each.
    """
    if device.type == "cpu" or all(tensor.device == device for tensor in tensors):
        return list(tensors)
    rows = [tensor.movedim(0, -1) if tensor.ndim == 3 else tensor for tensor in tensors]
    sizes = [row.numel() for row in rows]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, row in zip(packed.split(sizes), rows, strict=True):
        part.view(row.shape).copy_(row)
    parts = [p.view(row.shape) for p, row in zip(packed.to(device, non_blocking=True).split(sizes), rows, strict=True)]
    return [part.movedim(-1, 0) if part.ndim == 3 else part for part in parts]


def free_memory() -> int:
    """Bytes that processes may still take: of the machine, and of its container where that has less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**32
    with contextlib.suppress(OSError, TypeError):  # not Linux
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1])
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, TypeError, ValueError):  # no container, or one without a limit
        cached = int(re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)[1])
        used = int((group / "memory.current").read_text()) - cached  # what was read from disk gives way
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free
