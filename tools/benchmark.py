"""Measures training and evaluation stage by stage, with the data and sizes of a config.

    python tools/benchmark.py                                         # the quick start's
    python tools/benchmark.py --cfg configs/pascal_part_cpu.json
    python tools/benchmark.py batch_size=4 crop_size=64 --only step

One round before the first is not counted. Shown are the median of the rounds, the lowest and the highest. Epoch and
evaluation run the commands that users run. Measure on a machine that does nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
from PIL import Image

from configs.config import REPOSITORY, Config, load_config, save_config
from manage.data import TrainLoader
from manage.distributed import choose_device
from manage.experiment import environment
from manage.learner import Learner
from manage.network import load_hierarchy
from utils.cli import progress, run_main
from utils.encoding import load_encoding
from utils.errors import UserError

BATCHES, VAL_PHOTOS = 12, 60  # of an epoch, of an evaluation
Rows = Iterator[tuple[str, list[float]]]  # what is measured, and photos a second in each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", default=REPOSITORY / "configs/quickstart.json", help="a JSON config")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides)
    lines = ["| photos/s | median | lowest to highest |", "| --- | ---: | ---: |"]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        places = {"root_dir": folder, "root_data_dir": str(config.data_dir)}  # it writes nothing elsewhere
        few = {"n_train_photos": BATCHES * config.batch_size, "n_val_photos": VAL_PHOTOS}
        config = replace(config, **places, **few, pretrained=False, encoder_weights=None)
        for name in progress(arguments.only or STAGES, desc="stages"):
            lines += [table_row(title, values) for title, values in STAGES[name](config, arguments.rounds)]
    record = environment(choose_device(config.device))
    print("\n".join([*lines, "", *(f"{key}: {value}" for key, value in record.items())]))


def table_row(title: str, values: list[float]) -> str:
    return f"| {title} | {statistics.median(values):.4g} | {min(values):.4g} to {max(values):.4g} |"


# ---- measuring ---------------------------------------------------------------------------------------------------


def rates(action: Callable[[], object], photos: int, rounds: int) -> list[float]:
    """Photos a second. A GPU runs beside the program: the clock starts and stops when it is idle."""
    values, wait = [], torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(1 + rounds):
        wait()
        began = time.perf_counter()
        action()
        wait()
        values.append(photos / (time.perf_counter() - began))
    return values[1:]


def run(config: Config, script: str, *arguments: str) -> None:
    """One of our commands. Raises: UserError with what it said when it fails."""
    cfg = config.root / f"{config.exp_name}.json"
    save_config(config, cfg)
    command = [sys.executable, script, "--cfg", cfg, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script} failed:\n{done.stderr[-2000:]}")


# ---- stages ------------------------------------------------------------------------------------------------------


def train_parts(config: Config) -> tuple[Learner, TrainLoader]:
    device, hierarchy = choose_device(config.device), load_hierarchy(config)
    learner = Learner(config, hierarchy, load_encoding(config.labels_dir, hierarchy), device)
    learner.set_train_mode(is_frozen=False)
    return learner, TrainLoader(replace(config, num_workers=0), hierarchy, device=device)


def step_stage(config: Config, rounds: int) -> Rows:
    """Forward, loss, backward, optimiser; and the loss alone."""
    learner, loader = train_parts(config)
    batch = next(iter(loader))
    photos, labels = len(batch.image), batch.labels
    yield "training step, batch in memory", rates(lambda: learner.step([batch], config.lr), photos, rounds)
    size = (photos, learner.hierarchy.num_nodes, *labels.shape[1:])
    logits = torch.randn(size, device=labels.device, requires_grad=True)
    values = rates(lambda: learner.criterion(logits, labels).backward(), photos, rounds)
    yield "the criterion alone, forward and backward", values


def loading_stage(config: Config, rounds: int) -> Rows:
    """Random views, one thread, nobody else at work: of photos that are decoded anew, and of kept ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learner, loader = train_parts(config)
    files = loader.photos.files

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
        yield f"random views, {title}, one thread", rates(views, len(files), rounds)
    torch.set_num_threads(threads)


def epoch_stage(config: Config, rounds: int) -> Rows:
    """train.py, its second epoch: the first one decodes the photos and warms up."""
    values = []
    for number in range(rounds):
        config = replace(config, n_epochs=2, exp_name=f"epoch_{number}", val_every=2, save_epoch=2)
        run(config, "train.py")
        lines = (config.experiment_dir / "metrics.jsonl").read_text().splitlines()
        values.append(json.loads(lines[-1])["photos_per_second"])
    yield "a training epoch, train.py", values


def evaluation_stage(config: Config, rounds: int) -> Rows:
    """evaluate.py by its own clock."""
    config, values = replace(config, n_epochs=1, exp_name="evaluated"), []
    run(config, "train.py")
    for _ in range(rounds):
        run(config, "evaluate.py", "--checkpoint", "last", "--no-pictures")
        record = json.loads((config.experiment_dir / "evaluation" / "last" / "scores.json").read_text())
        values.append(record["photos"] / record["seconds"])
    yield "evaluation without pictures, evaluate.py", values


STAGES: dict[str, Callable[[Config, int], Rows]] = {
    "step": step_stage,
    "loading": loading_stage,
    "epoch": epoch_stage,
    "evaluation": evaluation_stage,
}


if __name__ == "__main__":
    run_main(main)
