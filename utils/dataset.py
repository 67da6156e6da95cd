"""Photos and label maps on disk -> bytes, read ahead and kept, and the order of an epoch. Knows no tree."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.ids import PhotoFolder
from utils.images import read_labels, read_photo, scaled_size
from utils.memory import CPU, free_memory, to_device


class Sample(NamedTuple):
    """A photo and its labels; or a batch of such, stacked, with (B,) indices and a list of faults."""

    image: Tensor  # (3, H, W) uint8
    labels: Tensor  # (H, W) uint8
    index: int  # into the ids
    fault: str  # why it could not be read, or ""


class Draw(NamedTuple):
    """Which photo, and the seed of its random view: all the chance in loading lies in the sampler."""

    index: int
    seed: int


class Files(NamedTuple):
    """The photo and the label map of one id."""

    photo: Path
    labels: Path


def find_samples(ids: Sequence[str], images_dir: Path, labels_dir: Path, tolerate: int = 0) -> list[Files]:
    """The files of every id, so that a missing one is named before training, not in the middle of it.

    So many are tolerated that lack one: reading them fails, and is counted there. Raises: UserError.
    """
    photos, files, missing = PhotoFolder(images_dir), [], []
    for sample_id in ids:
        photo, labels = images_dir / sample_id, labels_dir / f"{sample_id}.png"
        try:
            photo = photos.find(sample_id)
            missing += [] if labels.is_file() else [f"{labels}: no such label map"]
        except UserError as error:
            missing.append(str(error))
        files.append(Files(photo, labels))
    if len(missing) > tolerate:
        raise UserError(
            f"{len(missing)} of {len(ids)} ids lack a photo or a label map (the first: {missing[0]}); check "
            "root_data_dir and the id lists, and run tools/dataset_hie_enc.py"
        )
    return files


@dataclass
class Photos:
    """The photos of a split, at `short_side`. Labels are below `n_labels`, or void.

    Training wants labels at the photo's size, evaluation at their own (`native_labels`). So many `threads` read so many
    photos `ahead`; what was read is kept where `keep` says: in memory, on a device, or nowhere (None).
    """

    files: Sequence[Files]
    short_side: int | None
    n_labels: int
    void: int
    native_labels: bool = False
    threads: int = 0
    ahead: int = 0
    keep: torch.device | None = None
    kept: dict[int, Sample] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Iterable[int]) -> Iterator[Sample]:
        """The photos of the indices, in their order: what decodes a picture lets other threads run meanwhile."""
        pool, waiting = ThreadPoolExecutor(max(1, self.threads), "photos"), deque()
        try:
            for index in indices:
                waiting.append(pool.submit(lambda i: self.kept.get(i) or self[i], index))
                if len(waiting) > self.ahead * (self.threads > 0):
                    yield self._kept(waiting.popleft().result())
            while waiting:
                yield self._kept(waiting.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _kept(self, sample: Sample) -> Sample:
        if self.keep is not None and sample.index not in self.kept:
            image, labels = to_device([sample.image, sample.labels], self.keep)
            self.kept[sample.index] = sample._replace(image=image, labels=labels)
        return self.kept.get(sample.index, sample)

    def __getitem__(self, index: int) -> Sample:
        """Read anew."""
        try:
            photo, labels = self._read(self.files[index])
        except UserError as error:
            void = torch.full((1, 1), self.void, dtype=torch.uint8)
            return Sample(torch.zeros(3, 1, 1, dtype=torch.uint8), void, index, str(error))
        if not self.native_labels and photo.size != labels.shape[::-1]:
            labels = np.array(Image.fromarray(labels).resize(photo.size, Image.Resampling.NEAREST))
        return Sample(torch.from_numpy(np.array(photo)).permute(2, 0, 1), torch.from_numpy(labels), index, "")

    def _read(self, files: Files) -> tuple[Image.Image, np.ndarray]:
        photo, labels = read_photo(files.photo, self.short_side), read_labels(files.labels)
        expected = labels.shape[::-1] if self.short_side is None else scaled_size(labels.shape[::-1], self.short_side)
        if np.abs(np.subtract(photo.size, expected)).max() > (self.short_side is not None):
            raise UserError(
                f"{files.labels}: the label map is {labels.shape[1]} x {labels.shape[0]}, its photo {files.photo} "
                "is not; make them the same size and encode again"
            )
        strange = (labels >= self.n_labels) & (labels != self.void)
        if strange.any():
            unknown = f"{files.labels}: label {labels[strange][0]} is unknown"
            raise UserError(f"{unknown}; the map has changed since it was encoded: encode it again")
        return photo, labels

    def size(self) -> float:
        """Bytes that all take, estimated from a few of them."""
        some = [self[index] for index in range(0, len(self), max(1, len(self) // 8))]
        return len(self) * sum(sample.image.nbytes + sample.labels.nbytes for sample in some) / len(some)


def keep_photos(splits: dict[str, Photos], cache: str, device: torch.device) -> str:
    """Decides where the photos of each split are kept, so that each is decoded once; returns a line that says so.

    `auto` fills up to a quarter of what a GPU has free, else up to half of the machine's memory.

    Raises: UserError when they do not fit where the key `cache` wants them.
    """
    if cache == "off":
        return "no photos are kept (cache=off): each is decoded anew in every epoch"
    processes, is_auto = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), cache == "auto"
    places, room = {"memory": CPU}, {"memory": free_memory() / processes / (2 if is_auto else 1)}
    if device.type == "cuda":
        places = {"device": device} | places
        room["device"] = torch.cuda.mem_get_info(device)[0] / (4 if is_auto else 1)
    if not is_auto and cache not in places:
        raise UserError(f"key 'cache': 'device' needs a GPU, and this device is {device}; use auto, memory or off")
    said = []
    for name, photos in splits.items():
        size = photos.size()
        place = next((place for place in places if (is_auto or cache == place) and size <= room[place]), None)
        if place is None and not is_auto:
            raise UserError(
                f"key 'cache': the {name} photos take {size / 2**30:.1f} GiB, and {room[cache] / 2**30:.1f} GiB are "
                f"free in {cache}; use off, or a smaller short_side"
            )
        if place:
            photos.keep = places[place]
            room[place] -= size
        said.append(f"{name} {'in ' + place if place else 'not'} ({size / 2**20:.0f} MiB)")
    return f"photos kept between epochs (cache={cache}): {', '.join(said)}"


class EpochBatches:
    """The batches of one epoch for one process: an order and random seeds that depend on (seed, epoch) alone.

    A global batch of `batch_size * world` photos is cut into one slice a process, so that the photos of a step do
    not depend on how loading is done. Photos that do not fill a step are left out of that epoch.
    """

    def __init__(self, n_photos: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, multiple: int = 1):
        self.n_photos, self.batch_size, self.seed, self.rank, self.world = n_photos, batch_size, seed, rank, world
        self.n_batches = n_photos // (batch_size * world * multiple) * multiple
        self.epoch, self.first = 0, 0
        if self.n_batches == 0:
            raise UserError(
                f"key 'batch_size': {n_photos} training photos do not fill one step of {batch_size * world * multiple} "
                "(batch_size x processes x accumulate); lower batch_size"
            )

    def start_at(self, epoch: int, first: int = 0) -> None:
        """The next iteration is of this epoch, from its batch number `first` on."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.n_photos, generator=generator).tolist()
        for batch in range(self.first, self.n_batches):
            start = (batch * self.world + self.rank) * self.batch_size
            yield [Draw(order[i], mix(self.seed, self.epoch, i)) for i in range(start, start + self.batch_size)]


def mix(*numbers: int) -> int:
    """A seed from several numbers, without the collisions of adding them."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
