"""Measures training and evaluation stage by stage, with the sizes of a config.

    python tools/benchmark.py                                         # drawn photos of 375 x 500, crops of 480
    python tools/benchmark.py --cfg configs/pascal_part_cpu.json      # your data and sizes
    python tools/benchmark.py batch_size=4 crop_size=256 --only step loss
    python tools/benchmark.py --against ../other --only epoch evaluation    # another checkout, in turns
    python tools/benchmark.py --gpu-plan --cfg configs/hseg_bce_100.json    # what a GPU will be asked: counts, no times

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
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
from PIL import Image

from configs.config import REPOSITORY, Config, config_from_dict, load_config, parse_overrides, save_config
from manage.data import TrainLoader, train_loader
from manage.distributed import choose_device
from manage.experiment import environment
from manage.learner import Learner
from manage.network import load_hierarchy
from utils.cli import progress, run_main
from utils.dataset import EpochBatches
from utils.encoding import load_encoding
from utils.errors import UserError

DRAWN = {"crop_size": 480, "batch_size": 4, "pretrained": False}  # what two cores manage
BATCHES, VAL_PHOTOS = 12, 60  # of an epoch, of an evaluation
Rows = Iterator[tuple[str, list[float]]]  # what is measured, and photos a second in each round


@dataclass
class Setting:
    """What is measured, and where it may write."""

    config: Config
    folder: Path
    rounds: int
    checkouts: list[Path]  # this one, and the one that it is measured against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="a JSON config; without it, photos are drawn")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--against", type=Path, metavar="D", help="another checkout, for epoch and evaluation")
    parser.add_argument("--gpu-plan", action="store_true", help="count what a GPU will be asked, measure nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values")
    arguments = parser.parse_intermixed_args()
    if arguments.gpu_plan:
        from tools.gpu_plan import plan_table  # counts by what is private to torch: only when asked for

        print(plan_table(load_config(arguments.cfg, arguments.overrides)))
        return
    lines = ["| photos/s | median | lowest to highest |", "| --- | ---: | ---: |"]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        setting = prepare(Path(folder), arguments)
        for name in progress(arguments.only or STAGES, desc="stages"):
            lines += [table_row(title, values) for title, values in STAGES[name](setting)]
        record = environment(choose_device(setting.config.device))
    print("\n".join([*lines, "", *(f"{key}: {value}" for key, value in record.items())]))


def table_row(title: str, values: list[float]) -> str:
    return f"| {title} | {statistics.median(values):.4g} | {min(values):.4g} to {max(values):.4g} |"


def prepare(folder: Path, arguments: argparse.Namespace) -> Setting:
    """The config with its own data, or with drawn ones; what it writes goes to `folder`."""
    if arguments.cfg is not None:
        config = load_config(arguments.cfg, arguments.overrides)
    else:
        values = DRAWN | {"root_data_dir": str(folder / "data")} | parse_overrides(arguments.overrides)
        config = config_from_dict(values, "the config of the drawn photos")
        count = ["--train", BATCHES * config.batch_size, "--val", VAL_PHOTOS, "--size", 375]
        run(REPOSITORY, "tools/make_sample_data.py", "--out", config.data_dir, *count)
        run(REPOSITORY, "tools/dataset_hie_enc.py", f"root_data_dir={config.data_dir}", f"hierarchy={config.hierarchy}")
    config = replace(
        config,
        root_dir=str(folder),
        root_data_dir=str(config.data_dir),
        n_train_photos=BATCHES * config.batch_size,
        n_val_photos=VAL_PHOTOS,
        pretrained=False,
        encoder_weights=None,
    )
    checkouts = [REPOSITORY, *([arguments.against.resolve()] if arguments.against else [])]
    return Setting(config, folder, arguments.rounds, checkouts)


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


def run(checkout: Path, script: str, *arguments: object) -> None:
    """One of our commands. Raises: UserError with what it said when it fails."""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout / script} failed:\n{done.stderr[-2000:]}")


def in_turns(setting: Setting, measure: Callable[[Path, int], float], title: str) -> Rows:
    """Every checkout once a round, so that the machine's mood meets all; and their ratio within the rounds."""
    values = [[measure(place, number) for place in setting.checkouts] for number in range(setting.rounds)]
    ours, *theirs = map(list, zip(*values, strict=True))
    yield title, ours
    for other in theirs:
        yield f"{title}, the other", other
        yield f"{title}, times as many", [a / b for a, b in zip(ours, other, strict=True)]


# ---- stages ------------------------------------------------------------------------------------------------------


def train_parts(setting: Setting) -> tuple[Learner, TrainLoader, EpochBatches]:
    config, device, hierarchy = setting.config, choose_device(setting.config.device), load_hierarchy(setting.config)
    learner = Learner(config, hierarchy, load_encoding(config.labels_dir, hierarchy), device)
    learner.set_train_mode(is_frozen=False)
    return learner, *train_loader(replace(config, num_workers=0), hierarchy, 0, 1, device)


def step_stage(setting: Setting) -> Rows:
    """Forward, loss, backward, optimiser."""
    learner, loader, _ = train_parts(setting)
    batch = next(iter(loader))
    values = rates(lambda: learner.step([batch], setting.config.lr), len(batch.image), setting.rounds)
    yield "training step, batch in memory", values


def loss_stage(setting: Setting) -> Rows:
    learner, loader, _ = train_parts(setting)
    labels = next(iter(loader)).labels
    size = (len(labels), learner.hierarchy.num_nodes, *labels.shape[1:])
    logits = torch.randn(size, device=labels.device, requires_grad=True)
    values = rates(lambda: learner.criterion(logits, labels).backward(), len(labels), setting.rounds)
    yield "the criterion alone, forward and backward", values


def loading_stage(setting: Setting) -> Rows:
    """Random views, one thread, nobody else at work: of photos that are decoded anew, and of kept ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learner, loader, batches = train_parts(setting)
    files = loader.photos.files

    def views() -> None:
        batches.start_at(0)
        for _ in loader:
            pass

    def decode() -> None:
        for file in files:
            with Image.open(file.photo) as photo:
                photo.load()

    yield "JPEG decode alone, one thread", rates(decode, len(files), setting.rounds)
    for title, keep in (("decoded anew", None), ("kept photos", learner.device)):
        loader.photos.keep = keep
        yield f"random views, {title}, one thread", rates(views, len(files), setting.rounds)
    torch.set_num_threads(threads)


def epoch_stage(setting: Setting) -> Rows:
    """train.py, its second epoch: the first one decodes the photos and warms up."""

    def epoch(checkout: Path, number: int) -> float:
        name = f"epoch_{setting.checkouts.index(checkout)}_{number}"
        config = replace(setting.config, n_epochs=2, exp_name=name, val_every=2, save_epoch=2)
        run(checkout, "train.py", "--cfg", write_config(setting, config))
        return json.loads((config.experiment_dir / "metrics.jsonl").read_text().splitlines()[-1])["photos_per_second"]

    yield from in_turns(setting, epoch, "a training epoch, train.py")


def evaluation_stage(setting: Setting) -> Rows:
    """evaluate.py by its own clock."""
    config = replace(setting.config, n_epochs=1, exp_name="evaluated")
    cfg = write_config(setting, config)
    run(setting.checkouts[-1], "train.py", "--cfg", cfg)

    def evaluate(checkout: Path, _number: int) -> float:
        run(checkout, "evaluate.py", "--cfg", cfg, "--checkpoint", "last", "--no-pictures")
        record = json.loads((config.experiment_dir / "evaluation" / "last" / "scores.json").read_text())
        return record["photos"] / record["seconds"]

    yield from in_turns(setting, evaluate, "evaluation without pictures, evaluate.py")


def write_config(setting: Setting, config: Config) -> Path:
    path = setting.folder / f"{config.exp_name}.json"
    save_config(config, path, full=False)  # another checkout need not know every key
    return path


STAGES: dict[str, Callable[[Setting], Rows]] = {
    "step": step_stage,
    "loss": loss_stage,
    "loading": loading_stage,
    "epoch": epoch_stage,
    "evaluation": evaluation_stage,
}


if __name__ == "__main__":
    run_main(main)
