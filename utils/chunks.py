"""Cuts a batch of logits into chunks that stay in the cache, so that ten operations cost one trip to memory."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CPU_CHUNK = 2**19  # elements a thread: a few buffers of two megabytes fit the caches
DEVICE_CHUNK = 2**22  # elements: few launches, yet small beside the logits

# glibc gives freed memory back to the system and takes it anew for every block larger than the largest yet freed:
# one such block, never touched, and the short-lived tensors of a chunk cost no page faults from then on.
torch.empty(31 * 2**20, dtype=torch.uint8)


def chunks(shape: torch.Size, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of pixels that cover a tensor of shape (B, N, P) in blocks of about equal size."""
    batch, nodes, pixels = shape
    threads = _threads(device)
    most = max(1, (CPU_CHUNK * threads if device.type == "cpu" else DEVICE_CHUNK) // nodes)
    samples = max(1, most // max(1, pixels))
    step = math.ceil(pixels / max(1, math.ceil(pixels / most)) / threads) * threads
    for sample in range(0, batch, samples):
        for pixel in range(0, pixels, step or 1):
            yield slice(sample, sample + samples), slice(pixel, pixel + step)


def cuts(shape: torch.Size, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """For each chunk of a tensor of shape (B, N, P) a function from (B, ..., P) to its part of that chunk, (K, ..., p).

    A chunk is some small samples, or as many stretches of one large sample as there are threads. torch hands the first
    half of a tensor to the first of two threads: with the blocks in front that half is the same pixels whatever the
    rows, and each core works on what it has in its own cache.
    """
    threads = _threads(device)
    for samples, pixels in chunks(shape, device):
        yield lambda tensor, samples=samples, pixels=pixels: _blocks(tensor[samples, ..., pixels], threads)


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _blocks(part: Tensor, threads: int) -> Tensor:
    """One sample's pixels in `threads` stretches, where that comes out even. Shape: (1, ..., p) -> (K, ..., p / K)."""
    if len(part) > 1 or part.shape[-1] % threads:
        return part
    return part[0].unflatten(-1, (threads, -1)).movedim(-2, 0)


class Workspace:
    """Named memory that each chunk uses anew: it is taken once, and each core finds its part where it left it."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of any content, of the type and on the device of `like`."""
        size = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = like.new_empty(size)
        return self.memory[name][:size].view(shape)
