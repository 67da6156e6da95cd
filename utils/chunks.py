"""Cuts a batch of logits into blocks that stay in the cache, so that ten operations cost one trip to memory."""

from collections.abc import Iterator

import torch

CPU_CHUNK = 2**17  # elements a thread: a few buffers of half a megabyte fit the caches
DEVICE_CHUNK = 2**22  # elements: few launches, yet small beside the logits


def chunks(shape: torch.Size, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of pixels that cover a tensor of shape (B, N, P) in blocks of about equal size."""
    batch, nodes, pixels = shape
    elements = CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else DEVICE_CHUNK
    step = max(1, elements // nodes)
    samples = max(1, step // max(1, pixels))
    for sample in range(0, batch, samples):
        for pixel in range(0, pixels, step):
            yield slice(sample, sample + samples), slice(pixel, pixel + step)
