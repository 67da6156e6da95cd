"""Measures a training step and the loading of photos, with the data and sizes of a config.

    python tools/benchmark.py                                         # the quick start's
    python tools/benchmark.py --cfg configs/pascal_part_cpu.json
    python tools/benchmark.py batch_size=4 crop_size=64

One round before the first is not counted. Shown are the median of the rounds, the lowest and the highest. Measure on a
machine that does nothing else. A whole epoch and an evaluation time themselves: metrics.jsonl and scores.json of a run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
from PIL import Image

from configs.config import REPOSITORY, load_config
from manage.data import TrainLoader
from manage.distributed import choose_device, start
from manage.experiment import environment
from manage.learner import Learner
from manage.network import load_hierarchy
from utils.cli import run_main
from utils.encoding import load_encoding

Rows = Iterator[tuple[str, list[float]]]  # what is measured, and photos a second in each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", default=REPOSITORY / "configs/quickstart.json", help="a JSON config")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides)
    config = replace(config, n_train_photos=12 * config.batch_size, num_workers=0)  # twelve batches are enough
    config = replace(config, pretrained=False, encoder_weights=None)
    device, hierarchy = choose_device(config.device), load_hierarchy(config)
    start(device)  # the clock waits for the GPU that is chosen
    learner = Learner(config, hierarchy, load_encoding(config.labels_dir, hierarchy).pixels, device)
    loader = TrainLoader(config, hierarchy, device=device)
    lines = ["| photos/s | median | lowest to highest |", "| --- | ---: | ---: |"]
    for measure in (measure_step, measure_loading):
        for title, values in measure(learner, loader, arguments.rounds):
            spread = f"{min(values):.4g} to {max(values):.4g}"
            lines.append(f"| {title} | {statistics.median(values):.4g} | {spread} |")
    print("\n".join([*lines, "", *(f"{key}: {value}" for key, value in environment(device).items())]))


def rates(action: Callable[[], object], photos: int, rounds: int) -> list[float]:
    """Photos a second: a round repeats the action for a second. The clock starts and stops when a GPU is idle."""
    values, wait = [], torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(1 + rounds):
        wait()
        began, times = time.perf_counter(), 0
        while time.perf_counter() < began + 1:
            action()
            times += 1
        wait()
        values.append(times * photos / (time.perf_counter() - began))
    return values[1:]


def measure_step(learner: Learner, loader: TrainLoader, rounds: int) -> Rows:
    """Forward, loss, backward, optimiser; and the loss alone."""
    learner.set_train_mode(is_frozen=False)
    batch = next(iter(loader))
    photos, labels = len(batch.image), batch.labels
    step = rates(lambda: learner.step([batch], learner.config.lr), photos, rounds)
    yield "training step, batch in memory", step
    size = (photos, learner.hierarchy.num_nodes, *labels.shape[1:])
    logits = torch.randn(size, device=labels.device, requires_grad=True)
    values = rates(lambda: learner.criterion(logits, labels).backward(), photos, rounds)
    yield "the criterion alone, forward and backward", values


def measure_loading(learner: Learner, loader: TrainLoader, rounds: int) -> Rows:
    """Random views, one thread, nobody else at work: of photos that are decoded anew, and of kept ones."""
    threads, files = torch.get_num_threads(), loader.photos.files
    n_views = loader.batches.n_batches * loader.batches.batch_size  # photos that fill no step are left out
    torch.set_num_threads(1)

    def views() -> None:
        loader.batches.start_at(0)
        for _ in loader:
            pass

    def decode() -> None:
        for file in files:
            with Image.open(file.photo) as photo:
                photo.load()

    yield "JPEG decode alone, one thread", rates(decode, len(files), rounds)
    for title, keep in (("decoded anew", None), ("kept photos", learner.device)):
        loader.photos.keep = keep
        yield f"random views, {title}, one thread", rates(views, n_views, rounds)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    run_main(main)
