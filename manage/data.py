"""Config -> data sets and loaders, with every file checked before the first step."""

import os
import signal
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from configs.config import Config
from manage.experiment import cores
from utils.dataset import EpochBatches, Sample, TrainPhotos, WholePhotos, find_samples
from utils.encoding import Encoding, load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.images import read_ids
from utils.transforms import RandomView


def read_split(config: Config, split: str) -> list[str]:
    """The ids of "train" or "val", cut to n_train_photos or n_val_photos."""
    limit = config.n_train_photos if split == "train" else config.n_val_photos
    return read_ids(config.ids_file(split))[:limit]


def check_data(config: Config, hierarchy: Hierarchy, splits: Sequence[str] = ("train", "val")) -> Encoding:
    """Folders, encoding and id lists; the photos of `splits` have to be encoded.

    Raises: UserError naming the first thing that is not there or does not fit.
    """
    if not config.data_dir.is_dir():
        raise UserError(
            f"key 'root_data_dir': {config.data_dir} is not there. Prepare the data set "
            "(tools/prepare_pascal_part.py), or draw sample data: python tools/make_sample_data.py"
        )
    if not config.images_dir.is_dir():
        raise UserError(f"key 'img_dir': {config.images_dir} is not there; expected a folder of photos")
    encoding = load_encoding(config.labels_dir, hierarchy)
    ids = {split: read_split(config, split) for split in ("train", "val")}
    for split in splits:
        unknown = [sample_id for sample_id in ids[split] if sample_id not in encoding.ids]
        if unknown:
            raise UserError(
                f"{config.ids_file(split)}: {len(unknown)} of {len(ids[split])} ids (the first: {unknown[0]}) had no "
                f"mask when {config.labels_dir} was encoded. Add their masks and encode again: "
                "python tools/dataset_hie_enc.py (with the --cfg of this experiment); or take the ids from the list"
            )
    if config.ids_file("train") != config.ids_file("val"):
        shared = sorted(set(ids["train"]) & set(ids["val"]))
        if shared:
            raise UserError(
                f"{len(shared)} ids are in both {config.ids_file('train')} and {config.ids_file('val')} (the first: "
                f"{shared[0]}); scores on photos that were trained on mean nothing"
            )
    return encoding


def train_loader(config: Config, hierarchy: Hierarchy, rank: int, world: int) -> tuple[DataLoader, EpochBatches]:
    """The loader of random views and the sampler that says which epoch it reads."""
    files = find_samples(read_split(config, "train"), config.images_dir, config.labels_dir)
    view = RandomView(
        config.crop_size,
        config.short_side,
        config.scale_jitter,
        config.hflip,
        config.color_jitter,
        hierarchy.ignore_index,
    )
    photos = TrainPhotos(files, view, hierarchy.ignore_index, config.crop_size, hierarchy.num_nodes)
    batches = EpochBatches(len(photos), config.batch_size, config.seed, rank, world, config.accumulate)
    workers = n_workers(config, without_gpu=1)
    loader = DataLoader(
        photos,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader's own draws leave the global generator alone
        worker_init_fn=_start_worker,
    )
    return loader, batches


def val_loader(config: Config, hierarchy: Hierarchy, ids: list[str], rank: int = 0, world: int = 1) -> DataLoader:
    """Whole photos, one at a time; with several processes each photo belongs to exactly one of them."""
    files = find_samples(ids, config.images_dir, config.labels_dir)
    photos = WholePhotos(files, config.short_side, hierarchy.num_nodes, hierarchy.ignore_index)
    workers = n_workers(config, without_gpu=0)
    return DataLoader(
        photos,
        batch_size=None,
        sampler=range(rank, len(photos), world),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_start_worker,
    )


def n_workers(config: Config, without_gpu: int) -> int:
    """`auto`: with a GPU all cores but one, at most 16; without one the network needs the cores.

    There training takes one worker, to augment meanwhile, and evaluation none: a worker that reads for 2 ms makes a
    pass of the network over all cores 10 ms longer.
    """
    if config.num_workers != "auto":
        return config.num_workers
    return min(16, max(1, cores() - 1)) if torch.cuda.is_available() else without_gpu


class Tolerance:
    """Counts the photos of one split that this process could not read, and stops beyond the configured number."""

    def __init__(self, limit: int, ids: list[str]) -> None:
        self.limit, self.ids, self.faults = limit, ids, {}

    def check(self, index: int, fault: str) -> bool:
        """Whether the photo can be used.

        Raises: UserError when more than `limit` photos cannot be read.
        """
        if not fault:
            return True
        self.faults[self.ids[index]] = fault
        if len(self.faults) > self.limit:
            hint = "repair or remove it" if self.limit == 0 else f"skip_unreadable allows {self.limit}"
            raise UserError(f"photo {self.ids[index]!r}: {fault} ({hint})")
        return False

    def report(self) -> None:
        for sample_id, fault in self.faults.items():
            print(f"left out: {sample_id}: {fault}")


def samples_of(batch: Sample) -> Iterator[tuple[int, str]]:
    """(index, fault) of each sample in a batch."""
    return zip(batch.index.tolist(), batch.fault, strict=True)


STOPS = {signal.SIGTERM, signal.SIGINT}


def batches_of(loader: DataLoader) -> Iterator:
    """`iter(loader)`, whose workers no signal can end before they have a process group of their own."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the workers inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # what came meanwhile, this process hears now


def _start_worker(_worker: int) -> None:
    """One thread; and a process group of its own: Ctrl-C and torchrun signal the whole group of the main process.

    That one wants to end its step and save, for which its workers must live. They end with it, whatever ends it.
    """
    torch.set_num_threads(1)
    os.setpgrp()
    while meant_for_the_group := signal.sigpending() & STOPS:
        signal.sigwait(meant_for_the_group)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
