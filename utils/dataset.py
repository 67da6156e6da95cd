"""Photos and label maps on disk -> samples. Labels stay one byte a pixel; the tree is applied on the device."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from utils.errors import UserError
from utils.images import PHOTO_SUFFIXES, find_file, read_labels, read_photo
from utils.transforms import to_tensors


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


def find_samples(ids: Sequence[str], images_dir: Path, labels_dir: Path) -> list[Files]:
    """The files of every id, so that a missing one is named before training, not in the middle of it.

    Raises: UserError with the missing ids.
    """
    files, missing = [], []
    for sample_id in ids:
        try:
            labels = labels_dir / f"{sample_id}.png"
            photo = find_file(images_dir, sample_id, PHOTO_SUFFIXES)
            if not labels.is_file():
                raise UserError(f"{labels}: no such label map")
            files.append(Files(photo, labels))
        except UserError as error:
            missing.append(str(error))
    if missing:
        more = f"\n  and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{len(missing)} of {len(ids)} ids lack a photo or a label map:\n  "
            + "\n  ".join(missing[:5])
            + f"{more}\nCheck root_data_dir and the id lists, and run tools/dataset_hie_enc.py"
        )
    return files


class TrainPhotos(Dataset):
    """Random views of the training photos, indexed by `Draw`; labels are below `n_labels`, or void."""

    def __init__(self, files: Sequence[Files], view: Callable, void: int, size: int, n_labels: int) -> None:
        self.files, self.view, self.void, self.size, self.n_labels = files, view, void, size, n_labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> Sample:
        try:
            photo, labels = _read(self.files[draw.index], self.n_labels, self.void)
        except UserError as error:
            image = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return Sample(image, torch.full(image.shape[1:], self.void, dtype=torch.uint8), draw.index, str(error))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)
            return Sample(*self.view(photo, labels), draw.index, "")


class WholePhotos(Dataset):
    """Whole photos for evaluation: the image at `short_side`, the labels at native size."""

    def __init__(self, files: Sequence[Files], short_side: int | None, n_labels: int, void: int) -> None:
        self.files, self.short_side, self.n_labels, self.void = files, short_side, n_labels, void

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        try:
            photo, labels = _read(self.files[index], self.n_labels, self.void, self.short_side)
        except UserError as error:
            return Sample(torch.empty(0), torch.empty(0), index, str(error))
        return Sample(*to_tensors(photo, labels), index, "")


def _read(files: Files, n_labels: int, void: int, short_side: int | None = None) -> tuple:
    photo, labels = read_photo(files.photo, short_side), read_labels(files.labels)
    height, width = labels.shape
    expected = photo.size if short_side is None else _short_side_size(width, height, short_side)
    fits = photo.size == (width, height) if short_side is None else _close(photo.size, expected)
    if not fits:
        raise UserError(
            f"{files.labels}: the label map is {width} x {height}, its photo {files.photo} is not; "
            "make them the same size and encode again"
        )
    strange = (labels >= n_labels) & (labels != void)
    if strange.any():
        raise UserError(
            f"{files.labels}: label {labels[strange][0]} is unknown; expected 0 to {n_labels - 1}, or {void} for void. "
            "The map has changed since it was encoded: encode it again"
        )
    return photo, labels


def _short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    scale = short_side / min(width, height)
    return round(width * scale), round(height * scale)


def _close(size: tuple[int, int], expected: tuple[int, int]) -> bool:
    return bool(np.all(np.abs(np.subtract(size, expected)) <= 1))


class EpochBatches(Sampler):
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
