"""Photos read ahead by threads, kept where they are wanted again, and moved to the device."""

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from utils.dataset import Photos, Sample
from utils.errors import UserError

CPU = torch.device("cpu")


class Store:
    """Photos in any order, read ahead by threads: what decodes a picture lets other threads run meanwhile.

    Photos once read are kept where `keep` says: in memory, on a device, or nowhere (None).
    """

    def __init__(self, photos: Photos, threads: int, ahead: int, n_wanted: int | None = None) -> None:
        self.photos, self.threads, self.ahead = photos, threads, ahead if threads else 0
        self.n_wanted = len(photos) if n_wanted is None else n_wanted  # by this process
        self.keep: torch.device | None = None
        self.kept: dict[int, Sample] = {}

    def read(self, indices: Iterable[int]) -> Iterator[Sample]:
        """The photos of the indices, in their order."""
        pool, waiting = ThreadPoolExecutor(max(1, self.threads), "photos"), deque()
        try:
            for index in indices:
                waiting.append(self.kept.get(index) or self._start(pool, index))
                if len(waiting) > self.ahead:
                    yield self._end(waiting.popleft())
            while waiting:
                yield self._end(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, index: int) -> "Sample | Future[Sample]":
        return pool.submit(self.photos.__getitem__, index) if self.threads else self.photos[index]

    def _end(self, job: "Sample | Future[Sample]") -> Sample:
        sample = job if isinstance(job, Sample) else job.result()
        if self.keep is not None and sample.index not in self.kept:
            image, labels = to_device([sample.image, sample.labels], self.keep)
            sample = self.kept[sample.index] = sample._replace(image=image, labels=labels)
        return sample


def keep_photos(stores: dict[str, Store], cache: str, device: torch.device) -> str:
    """Decides where the photos of each store are kept, so that each is decoded once; returns a line that says so.

    `auto` fills up to a quarter of what a GPU has free, else up to half of the machine's memory.

    Raises: UserError when they do not fit where the key `cache` wants them.
    """
    if cache == "off":
        return "no photos are kept (cache=off): each is decoded anew in every epoch"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    places, room = {"memory": CPU}, {"memory": free_memory() / processes / (2 if cache == "auto" else 1)}
    if device.type == "cuda":
        places = {"device": device} | places
        room["device"] = torch.cuda.mem_get_info(device)[0] / (4 if cache == "auto" else 1)
    if cache not in ("auto", *places):
        raise UserError(f"key 'cache': 'device' needs a GPU, and this device is {device}; use auto, memory or off")
    said = []
    for name, store in stores.items():
        size = store.n_wanted * store.photos.mean_size()
        found = [place for place in places if cache in ("auto", place) and size <= room[place]]
        if cache in places and not found:
            raise UserError(
                f"key 'cache': the {name} photos take {size / 2**30:.1f} GiB, and {room[cache] / 2**30:.1f} GiB are "
                f"free in {cache}; use off, or a smaller short_side"
            )
        if found:
            store.keep = places[found[0]]
            room[found[0]] -= size
        said.append(f"{name} {'in ' + found[0] if found else 'not'} ({size / 2**20:.0f} MiB)")
    return f"photos kept between epochs (cache={cache}): {', '.join(said)}"


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
