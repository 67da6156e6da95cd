"""What a training holds beside its network: optimiser, generators, and numbers on their way."""

import math
import os
import random
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.config import Config

LATE_STEPS = 4  # so many steps later the numbers of a step are read


def build_optimizer(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW; biases and normalisation are not decayed."""
    encoder = {*network.encoder.parameters()}
    groups = [
        {"params": params, "weight_decay": decay, "is_encoder": is_encoder}
        for is_encoder in (False, True)
        for decay, of_kind in ((config.weight_decay, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim <= 1))
        if (params := [p for p in network.parameters() if (p in encoder) == is_encoder and of_kind(p)])
    ]
    # fused: one pass over the weights (a fifth of the time on a CPU), and fp16 need not wait for its overflow flag
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


# --- numbers that no step waits for ---
@dataclass
class Step:
    """The numbers of one optimiser step: known at once, and read from the device later."""

    number: int
    lr: float
    photos: list[Tensor]  # indices of its photos
    values: Tensor
    copied: "torch.cuda.Event | None"

    def read(self) -> tuple[float, float, float]:
        """Loss, norm of the gradient, and scale of fp16."""
        if self.copied is not None:
            self.copied.synchronize()  # some steps ago: the device has work left meanwhile
        return tuple(self.values.tolist())

    def is_fine(self) -> bool:
        """Whether it was finite; an overflow in fp16 lowers the scale, which falls below 1 where that is no help."""
        loss, norm, scale = self.read()
        return math.isfinite(loss) and (math.isfinite(norm) or (scale >= 1 and math.isfinite(scale)))


class LateSteps:
    """Steps whose numbers are still on their way to the host."""

    def __init__(self) -> None:
        self.waiting: deque[Step] = deque()

    def put(self, number: int, lr: float, photos: list[Tensor], values: Tensor) -> None:
        """Shape: values (3,) on the device."""
        on_host, copied = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.waiting.append(Step(number, lr, photos, on_host, copied))

    def take(self, late: int = LATE_STEPS) -> Iterator[Step]:
        """Those that are at least so many steps old."""
        while len(self.waiting) > late:
            yield self.waiting.popleft()


# --- chance ---
def seed_everything(config: Config) -> None:
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)


def random_state(device: torch.device) -> dict:
    """The states of all generators, as plain values that load safely."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict, device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: on its GPU, else resident in the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss of a new process starts at what its parent had reached
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    except (OSError, TypeError):  # not Linux
        if sys.platform == "win32":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
