"""Measures training and evaluation stage by stage, with the sizes of a config.

    python tools/benchmark.py                                         # drawn photos of 375 x 500, crops of 480
    python tools/benchmark.py --cfg configs/pascal_part_cpu.json      # your data and sizes
    python tools/benchmark.py batch_size=4 crop_size=256 --only step loss --json out.json
    python tools/benchmark.py --against ../other --only epoch evaluation    # another checkout, in turns
    python tools/benchmark.py --gpu-plan --cfg configs/hseg_bce_100.json    # what a GPU will be asked: counts, no times

One round before the first is not counted. Shown are the median of the rounds, the lowest and the highest. Epoch,
evaluation and encoding run the commands that users run. Measure on a machine that does nothing else.
"""

import argparse
import json
import os
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
from manage.comparison import criterion_name
from manage.data import train_loader
from manage.distributed import choose_device
from manage.experiment import environment
from manage.learner import Learner
from manage.network import load_hierarchy
from utils.cli import progress, run_main
from utils.dataset import Sample
from utils.encoding import load_encoding
from utils.errors import UserError
from utils.files import write_json

DRAWN = {"crop_size": 480, "batch_size": 4, "pretrained": False, "exp_name": "drawn"}  # what two cores manage
BATCHES, VAL_PHOTOS = 12, 60  # of an epoch, of an evaluation


@dataclass
class Setting:
    """What is measured, and where it may write."""

    config: Config
    folder: Path
    rounds: int
    checkouts: list[Path]  # this one, and the one that it is measured against

    @property
    def device(self) -> torch.device:
        return choose_device(self.config.device)


@dataclass
class Row:
    """One line of the table: the values of the rounds."""

    title: str
    unit: str
    values: list[float]

    def cells(self) -> list[str]:
        numbers = (statistics.median(self.values), min(self.values), max(self.values))
        middle, low, high = (f"{value:.4g}" for value in numbers)
        return [self.title, f"{middle} {self.unit}", f"{low} to {high}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="a JSON config; without it, photos are drawn")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--against", type=Path, metavar="D", help="another checkout, for epoch and evaluation")
    parser.add_argument("--json", type=Path, metavar="F", help="write every round's value")
    parser.add_argument("--gpu-plan", action="store_true", help="count what a GPU will be asked, measure nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values")
    arguments = parser.parse_intermixed_args()
    if arguments.gpu_plan:
        from tools.gpu_plan import plan_table  # counts by what is private to torch: only when asked for

        print(plan_table(load_config(arguments.cfg, arguments.overrides)))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        setting = prepare(Path(folder), arguments)
        rows = []
        for name in (bar := progress(arguments.only or STAGES, desc="stages")):
            bar.set_postfix_str(name)
            rows += STAGES[name](setting)
        record = environment(setting.device)
    for cells in (["stage", "median", "lowest to highest"], ["---", "---:", "---:"], *(row.cells() for row in rows)):
        print(f"| {' | '.join(cells)} |")
    print("\n" + "\n".join(f"{key}: {value}" for key, value in record.items()))
    if arguments.json:
        write_json({"environment": record, "rows": [vars(row) for row in rows]}, arguments.json)


def prepare(folder: Path, arguments: argparse.Namespace) -> Setting:
    """The config with its own data, or with drawn ones; what it writes goes to `folder`."""
    if arguments.cfg is None:
        config = config_from_dict(DRAWN | parse_overrides(arguments.overrides), "the config of the drawn photos")
        data = folder / "data"
        count = ["--train", BATCHES * config.batch_size, "--val", VAL_PHOTOS, "--size", 375]
        run(REPOSITORY, "tools/make_sample_data.py", "--out", data, *count)
        run(REPOSITORY, "tools/dataset_hie_enc.py", f"root_data_dir={data}", f"hierarchy={config.hierarchy_file}")
    else:
        config = load_config(arguments.cfg, arguments.overrides)
        data = config.data_dir
    places = {"root_dir": str(folder), "root_data_dir": str(data), "hierarchy": str(config.hierarchy_file)}
    sizes = {"n_train_photos": BATCHES * config.batch_size, "n_val_photos": VAL_PHOTOS}
    untrained = {"pretrained": False, "encoder_weights": None, "warmup_epochs": 0.0}
    checkouts = [REPOSITORY, *([arguments.against.resolve()] if arguments.against else [])]
    return Setting(replace(config, **places, **sizes, **untrained), folder, arguments.rounds, checkouts)


# ---- measuring ---------------------------------------------------------------------------------------------------


def seconds(action: Callable[[], object], rounds: int) -> list[float]:
    """A GPU runs beside the program: the clock starts and stops when it is idle."""
    values, wait = [], torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(1 + rounds):
        wait()
        began = time.perf_counter()
        action()
        wait()
        values.append(time.perf_counter() - began)
    return values[1:]


def run(checkout: Path, script: str, *arguments: object) -> tuple[float, float]:
    """One of our commands; the seconds that it took, and the most memory that it held, in MiB.

    Raises: UserError with what it said when it fails.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=checkout, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if process.returncode:
            raise UserError(f"{checkout / script} failed:\n{log.read()[-2000:]}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def in_turns(setting: Setting, measure: Callable[[Path, int], float], title: str, unit: str) -> list[Row]:
    """Every checkout once a round, so that the machine's mood meets all; and their ratio within the rounds."""
    values = [[measure(place, number) for place in setting.checkouts] for number in range(setting.rounds)]
    columns = list(zip(*values, strict=True))
    if len(columns) == 1:
        return [Row(title, unit, list(columns[0]))]
    ratio = Row(f"{title}, ratio", "times as many", [a / b for a, b in zip(*columns, strict=True)])
    return [Row(title, unit, list(columns[0])), Row(f"{title}, the other", unit, list(columns[1])), ratio]


# ---- stages ------------------------------------------------------------------------------------------------------


def learner_and_batch(setting: Setting) -> tuple[Learner, Sample]:
    """What steps, and a batch that is there. Shape: image (B, 3, S, S), labels (B, S, S)."""
    config, device, hierarchy = setting.config, setting.device, load_hierarchy(setting.config)
    learner = Learner(config, hierarchy, load_encoding(config.labels_dir, hierarchy), device)
    learner.set_train_mode(is_frozen=False)
    b, s = config.batch_size, config.crop_size
    leaves = torch.tensor(hierarchy.leaves, dtype=torch.uint8)[
        torch.randint(len(hierarchy.leaves), (b, s // 32, s // 32))
    ]
    labels = leaves.repeat_interleave(32, 1).repeat_interleave(32, 2).to(device)
    images = torch.randint(256, (b, 3, s, s), dtype=torch.uint8).to(device)
    return learner, Sample(images, labels, torch.arange(b), [""] * b)


def step_stage(setting: Setting) -> Iterator[Row]:
    """Forward, loss, backward, optimiser."""
    learner, batch = learner_and_batch(setting)
    times = seconds(lambda: learner.step([batch], setting.config.lr), setting.rounds)
    yield Row("training step, batch in memory", "photos/s", [len(batch.image) / s for s in times])
    if setting.device.type == "cuda":
        yield Row("the most memory that it held", "MiB", [torch.cuda.max_memory_allocated(setting.device) / 2**20])


def loss_stage(setting: Setting) -> Iterator[Row]:
    learner, batch = learner_and_batch(setting)
    size = (len(batch.image), learner.hierarchy.num_nodes, *batch.labels.shape[1:])
    logits = torch.randn(size, device=setting.device, requires_grad=True)
    times = seconds(lambda: learner.criterion(logits, batch.labels).backward(), setting.rounds)
    title = f"{criterion_name(setting.config.criterion)} alone, forward and backward"
    yield Row(title, "photos/s", [len(batch.image) / s for s in times])


def loading_stage(setting: Setting) -> Iterator[Row]:
    """Random views, one thread, nobody else at work: of photos that are decoded anew, and of kept ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = replace(setting.config, num_workers=0)
    loader, batches = train_loader(config, load_hierarchy(config), 0, 1, setting.device)
    files = loader.store.photos.files

    def views() -> None:
        batches.start_at(0)
        for _ in loader:
            pass

    def decode() -> None:
        for file in files:
            with Image.open(file.photo) as photo:
                photo.load()

    for title, action, keep in (
        ("JPEG decode alone, one thread", decode, None),
        ("random views, decoded anew, one thread", views, None),
        ("random views, kept photos, one thread", views, setting.device),
    ):
        loader.store.keep = keep
        yield Row(title, "photos/s", [len(files) / s for s in seconds(action, setting.rounds)])
    torch.set_num_threads(threads)


def epoch_stage(setting: Setting) -> Iterator[Row]:
    """train.py, its second epoch: the first one decodes the photos and warms up."""

    def epoch(checkout: Path, number: int) -> float:
        name = f"epoch_{setting.checkouts.index(checkout)}_{number}"
        config = replace(setting.config, n_epochs=2, exp_name=name, val_every=2, save_epoch=2)
        memory.append(run(checkout, "train.py", "--cfg", write_config(setting, config))[1])
        return json.loads((config.experiment_dir / "metrics.jsonl").read_text().splitlines()[-1])["photos_per_second"]

    memory: list[float] = []
    yield from in_turns(setting, epoch, "a training epoch, train.py", "photos/s")
    if setting.device.type == "cpu":
        yield Row("the most memory that it held", "MiB", memory[:: len(setting.checkouts)])


def evaluation_stage(setting: Setting) -> Iterator[Row]:
    """evaluate.py by its own clock, with and without pictures."""
    config = replace(setting.config, n_epochs=1, exp_name="evaluated")
    cfg = write_config(setting, config)
    run(setting.checkouts[-1], "train.py", "--cfg", cfg)
    for title, options in (("evaluation, evaluate.py", ()), ("evaluation without pictures", ("--no-pictures",))):

        def evaluate(checkout: Path, _number: int, options: tuple = options) -> float:
            run(checkout, "evaluate.py", "--cfg", cfg, "--checkpoint", "last", *options)
            record = json.loads((config.experiment_dir / "evaluation" / "last" / "scores.json").read_text())
            return record["photos"] / record["seconds"]

        yield from in_turns(setting, evaluate, title, "photos/s")


def encoding_stage(setting: Setting) -> Iterator[Row]:
    """tools/dataset_hie_enc.py as a whole, with its start; what the values mean was checked when they were encoded."""
    masks, config = setting.config.data_dir / "gt_masks", setting.config
    places = [f"hierarchy={config.hierarchy_file}", "--gtdatadir", masks, "--imgdir", config.images_dir]
    command = [*places, "--assume-order", "--save_dir"]
    times = [
        run(REPOSITORY, "tools/dataset_hie_enc.py", *command, setting.folder / f"encoded{n}")[0]
        for n in range(setting.rounds)
    ]
    count = sum(1 for _ in masks.iterdir())
    yield Row("encoding, dataset_hie_enc.py with its start", "masks/s", [count / taken for taken in times])


def write_config(setting: Setting, config: Config) -> Path:
    path = setting.folder / f"{config.exp_name}.json"
    save_config(config, path, full=False)  # another checkout need not know every key
    return path


STAGES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "step": step_stage,
    "loss": loss_stage,
    "loading": loading_stage,
    "epoch": epoch_stage,
    "evaluation": evaluation_stage,
    "encoding": encoding_stage,
}


if __name__ == "__main__":
    run_main(main)
