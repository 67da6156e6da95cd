"""Config -> data sets and loaders, with every file checked before the first step."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from configs.config import Config
from manage import distributed
from utils.cli import cores
from utils.dataset import Draw, EpochBatches, Photos, Sample, find_samples
from utils.encoding import Encoding, check_encoded, load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import read_ids
from utils.memory import CPU, to_device
from utils.views import RandomViews


def read_split(config: Config, split: str) -> list[str]:
    """The ids of "train" or "val", cut to n_train_photos or n_val_photos."""
    limit = config.n_train_photos if split == "train" else config.n_val_photos
    return read_ids(config.ids_file(split))[:limit]


def check_data(config: Config, hierarchy: Hierarchy, splits: Sequence[str] = ("train", "val")) -> Encoding:
    """Folders, encoding and id lists; the photos of `splits` have to be encoded.

    Raises: UserError naming the first thing that is not there or does not fit.
    """
    if not config.data_dir.is_dir():
        advice = "prepare the data set (docs/data.md), or draw sample data: python tools/make_sample_data.py"
        raise UserError(f"key 'root_data_dir': {config.data_dir} is not there; {advice}")
    encoding = load_encoding(config.labels_dir, hierarchy)
    ids = {split: read_split(config, split) for split in ("train", "val")}
    for split in splits:
        check_encoded(encoding, ids[split], config.ids_file(split), config.obey_exif, config.skip_unreadable)
    lists, shared = [config.ids_file(split) for split in ids], {*ids["train"]} & {*ids["val"]}
    if shared and lists[0] != lists[1]:
        raise UserError(f"{len(shared)} ids are in both {lists[0]} and {lists[1]} (the first: {min(shared)})")
    return encoding


class TrainLoader:
    """The batches of an epoch: photos read ahead or kept, and random views of them made on the device.

    `batches` says which epoch is read. Raises: UserError for files that are missing.
    """

    def __init__(self, config: Config, hierarchy: Hierarchy, device: torch.device = CPU) -> None:
        if config.hflip > 0:
            hierarchy.check_sides(str(config.hierarchy_file), "set hflip=0")
        jitter = (config.scale_jitter, config.hflip, config.rotation, config.color_jitter)
        mirror = hierarchy.mirror and torch.tensor([*hierarchy.mirror, *range(hierarchy.num_nodes, 256)])
        self.views = RandomViews(config.crop_size, hierarchy.ignore_index, *jitter, mirror, device)
        self.photos = _photos(config, hierarchy, read_split(config, "train"), n_threads(config, device, without_gpu=1))
        rank, world = distributed.rank(), distributed.world()
        size = min(config.batch_size, max(1, len(self.photos) // (world * config.accumulate)))
        self.photos.ahead = 4 * size
        self.batches = EpochBatches(len(self.photos), size, config.seed, rank, world, config.accumulate)

    def __iter__(self) -> Iterator[Sample]:
        ahead, batches = itertools.tee(self.batches)
        samples = self.photos.read(draw.index for batch in ahead for draw in batch)
        for draws in batches:
            yield self._batch(draws, list(itertools.islice(samples, len(draws))))

    def _batch(self, draws: Sequence[Draw], samples: Sequence[Sample]) -> Sample:
        """Shape: image (B, 3, S, S), labels (B, S, S), index (B,)."""
        views = [self.views.draw(draw.seed, *s.labels.shape[::-1]) for draw, s in zip(draws, samples, strict=True)]
        images, labels = self.views.make([s.image for s in samples], [s.labels for s in samples], views)
        return Sample(images, labels, torch.tensor([s.index for s in samples]), [s.fault for s in samples])


class ValLoader:
    """Whole photos on the device, one at a time, their labels at native size; each belongs to one process."""

    def __init__(self, config: Config, hierarchy: Hierarchy, ids: list[str], device: torch.device = CPU) -> None:
        threads = n_threads(config, device, without_gpu=0)
        self.photos = _photos(config, hierarchy, ids, threads, ahead=4 * threads, native_labels=True)
        self.indices, self.device = range(distributed.rank(), len(self.photos), distributed.world()), device

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Sample]:
        return map(self._on_device, self.photos.read(self.indices))  # a loop here would hold what was read

    def _on_device(self, sample: Sample) -> Sample:
        image, labels = to_device([sample.image, sample.labels], self.device)
        return sample._replace(image=image.contiguous(), labels=labels)


def _photos(config: Config, hierarchy: Hierarchy, ids: list[str], threads: int, **how) -> Photos:
    files = find_samples(ids, config.images_dir, config.labels_dir, config.skip_unreadable)
    return Photos(files, config.short_side, hierarchy.num_nodes, hierarchy.ignore_index, threads=threads, **how)


def n_threads(config: Config, device: torch.device, without_gpu: int) -> int:
    """`auto`: for a GPU all cores but one, at most 16; without one the network needs the cores."""
    if config.num_workers != "auto":
        return config.num_workers
    return min(16, max(1, cores() - 1)) if device.type == "cuda" else without_gpu


class Tolerance:
    """Counts the photos of one split that this process could not read, and stops beyond the configured number."""

    def __init__(self, limit: int, ids: list[str]) -> None:
        self.limit, self.ids, self.faults = limit, ids, {}

    def check(self, index: int, fault: str) -> bool:
        """Whether the photo can be used. Raises: UserError when more than `limit` photos cannot be read."""
        if fault:
            self.faults[self.ids[index]] = fault
            if len(self.faults) > self.limit:
                raise UserError(f"photo {self.ids[index]!r}: {fault}; repair or remove it, or raise skip_unreadable")
        return not fault

    def report(self) -> None:
        for sample_id, fault in self.faults.items():
            print(f"left out: {sample_id}: {fault}")
