"""Photos and label maps on disk -> bytes, and the order of an epoch. Labels stay one byte a pixel. Knows no tree."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.ids import PhotoFolder
from utils.images import read_labels, read_photo, scaled_size


class Sample(NamedTuple):
    """image (3, H, W) uint8 · labels (H, W) uint8 · index into the ids · fault: why it could not be read, or ""."""

    image: Tensor
    labels: Tensor
    index: int
    fault: str


class Draw(NamedTuple):
    """Which photo, and the seed of its random view: all the chance in loading lies in the sampler."""

    index: int
    seed: int


@dataclass(frozen=True)
class Files:
    """The photo and the label map of one id."""

    photo: Path
    labels: Path


def find_samples(ids: Sequence[str], images_dir: Path, labels_dir: Path, tolerate: int = 0) -> list[Files]:
    """The files of every id, so that a missing one is named before training, not in the middle of it.

    So many are tolerated that lack one: reading them fails, and is counted there.

    Raises: UserError with the missing ids.
    """
    photos, files, missing = PhotoFolder(images_dir), [], []
    for sample_id in ids:
        photo, labels = photos.find(sample_id), labels_dir / f"{sample_id}.png"
        if isinstance(photo, str):
            missing.append(photo)
        elif not labels.is_file():
            missing.append(f"{labels}: no such label map")
        files.append(Files(images_dir / sample_id if isinstance(photo, str) else photo, labels))
    if len(missing) > tolerate:
        more = f"\n  and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{len(missing)} of {len(ids)} ids lack a photo or a label map:\n  "
            + "\n  ".join(missing[:5])
            + f"{more}\nCheck root_data_dir and the id lists, and run tools/dataset_hie_enc.py"
        )
    return files


class Photos:
    """The photos of a split, at `short_side`; each is read anew. Labels are below `n_labels`, or void.

    Training wants labels at the photo's size, evaluation at their own (`native_labels`).
    """

    def __init__(
        self, files: Sequence[Files], short_side: int | None, n_labels: int, void: int, native_labels: bool = False
    ) -> None:
        self.files, self.short_side, self.n_labels, self.void = files, short_side, n_labels, void
        self.native_labels = native_labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
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
            raise UserError(
                f"{files.labels}: label {labels[strange][0]} is unknown; expected 0 to {self.n_labels - 1}, or "
                f"{self.void} for void. The map has changed since it was encoded: encode it again"
            )
        return photo, labels

    def mean_size(self) -> float:
        """Bytes that a photo and its label map take, from a few of them; one that cannot be read takes next to none."""
        some = [self[index] for index in range(0, len(self), max(1, len(self) // 8))]
        return sum(sample.image.nbytes + sample.labels.nbytes for sample in some) / len(some)


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

    def __len__(self) -> int:
        return self.n_batches - self.first

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
