"""The stages of `tools/benchmark.py`: for each the plain baseline, our code, and the bound.

python tools/benchmark.py --only bce tree_min
"""

import argparse
import copy
import dataclasses
import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.config import REPOSITORY, Config, config_from_dict
from manage.checkpoint import pack
from manage.data import train_loader
from manage.distributed import choose_device
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from manage.inference import photo_logits
from manage.train_manager import TrainManager
from manage.training_state import peak_memory
from models.hseg import HSEG
from tools import baselines
from tools.make_sample_data import Settings, make_data_set
from utils import visualize
from utils.dataset import Draw, Sample, find_samples
from utils.decode import DECODERS
from utils.encoder import encode_folder
from utils.errors import UserError
from utils.files import write_whole
from utils.hierarchy import Hierarchy
from utils.ids import files_below, read_ids
from utils.images import MASK_SUFFIXES, read_labels, write_indexed
from utils.losses import LOSSES
from utils.metrics import LevelScores

TREE = REPOSITORY / "configs" / "hierarchies" / "pascal_part.json"
ENCODER = "resnet18"


@dataclass
class Setting:
    """How large everything is, and where it lies."""

    quick: bool
    folder: Path | None
    device: torch.device
    hierarchy: Hierarchy = field(default_factory=lambda: Hierarchy.load(TREE))

    @classmethod
    def of(cls, arguments: argparse.Namespace, folder: Path | None = None) -> "Setting":
        return cls(arguments.quick, folder, choose_device(arguments.device))

    @property
    def batch(self) -> int:
        return 2 if self.quick else 4

    @property
    def crops(self) -> tuple[int, ...]:
        return (64,) if self.quick else (256, 480)

    @property
    def photos(self) -> tuple[int, int]:
        """How many for training and for evaluation."""
        return (6, 4) if self.quick else (24, 200)

    @property
    def photo_size(self) -> int:
        """The longer side of drawn photos."""
        return 96 if self.quick else 500


@dataclass
class Contest:
    """Three ways to the same result, each a function that takes its time (or returns a cost of its own)."""

    title: str
    baseline: str
    plain: Callable[[], float | None]
    ours: Callable[[], float | None]
    target: float | None = None  # ours is at least so many times better than the baseline
    bound_title: str = ""
    bound: Callable[[], float | None] | None = None
    bound_target: float | None = None  # ours costs at most so many times the bound
    rounds: int = 7
    note: str = ""
    unit: str = "s"
    close: Callable[[], None] = gc.collect


def make_data(setting: Setting, source: Path | None) -> None:
    """A small data set in `setting.folder`: drawn, or the first photos of another one.

    Raises: UserError when `source` is no prepared data set.
    """
    train, val = setting.photos
    out = setting.folder / "data"
    if source is None:
        make_data_set(Settings(train=train, val=val, size=setting.photo_size, seed=0), out)
    else:
        masks = next((source / name for name in ("gt_masks", "gt_masks_hie") if (source / name).is_dir()), None)
        if masks is None:
            raise UserError(f"--data {source}: holds no gt_masks; give a prepared data folder")
        for split, count in (("train", train), ("val", val)):
            ids = read_ids(source / f"{split}_id.txt")[:count]
            for files in find_samples(ids, source / "JPEGImages", masks):
                for path, name in ((files.photo, "JPEGImages"), (files.labels, "gt_masks")):
                    (out / name).mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, out / name)
            (out / f"{split}_id.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    with quiet():
        encode_folder(out / "gt_masks", out / "JPEGImages", out / "gt_masks_hie", setting.hierarchy)


def config_for(setting: Setting, name: str, **keys) -> Config:
    values = {
        "exp_name": name,
        "root_dir": str(setting.folder),
        "root_data_dir": "data",
        "encoder": ENCODER,
        "pretrained": False,
        "device": "cuda" if setting.device.type == "cuda" else "cpu",
        "batch_size": setting.batch,
        "crop_size": setting.crops[0],
    }
    return config_from_dict(values | keys, "benchmark")


# --- data ---
def encode_stage(setting: Setting) -> Iterator[Contest]:
    """One core: so few masks that no worker processes are started."""
    h, data, out = setting.hierarchy, setting.folder / "data", setting.folder / "encoded"
    masks = files_below(data / "gt_masks", MASK_SUFFIXES)[:40]
    few = setting.folder / "few_masks"
    few.mkdir(exist_ok=True)
    for path in masks:
        shutil.copy(path, few)

    def ours() -> None:
        shutil.rmtree(out / "ours", ignore_errors=True)
        with quiet():
            encode_folder(few, data / "JPEGImages", out / "ours", h)

    def bound() -> None:
        (out / "bound").mkdir(parents=True, exist_ok=True)
        for path in masks:
            write_indexed(out / "bound" / path.name, read_labels(path), h.colours)

    plain = lambda: baselines.encode_folder(masks, out / "plain", h)  # noqa: E731
    plain(), ours()
    size = {name: sum(p.stat().st_size for p in (out / name).glob(f"*.{kind}")) for name, kind in KINDS.items()}
    yield Contest(
        "encode masks, one core",
        "ten booleans a pixel `.npy`, look-ups per class",
        plain,
        ours,
        target=10,
        bound_title="read + write PNG alone",
        bound=bound,
        note=f"{len(masks)} masks",
    )
    yield Contest(
        "size of the encoded masks",
        "ten booleans a pixel `.npy`",
        lambda: float(size["plain"]),
        lambda: float(size["ours"]),
        target=100,
        rounds=1,
        unit="bytes",
    )


KINDS = {"plain": "npy", "ours": "png"}


def load_stage(setting: Setting) -> Iterator[Contest]:
    h, size = setting.hierarchy, setting.crops[-1]
    config = config_for(setting, "load", crop_size=size, scale_jitter=[0.75, 1.5], num_workers=0)
    loader, _ = train_loader(config, h, 0, 1)
    photos = loader.store.photos
    planes = setting.folder / "planes"
    baselines.encode_folder([files.labels for files in photos.files], planes, h)

    def ours() -> None:
        for index in range(len(photos.files)):
            loader.batch([Draw(index, index)])

    def plain() -> None:
        for files in photos.files:
            baselines.load_view(files.photo, planes / f"{files.labels.stem}.npy", size, (0.75, 1.5))

    def bound() -> None:
        for files in photos.files:
            with Image.open(files.photo) as image:
                image.load()

    yield one_thread(
        Contest(
            f"load and augment, crop {size}, one thread",
            "13-channel float tensor, cropped last",
            plain,
            ours,
            target=7,
            bound_title="JPEG decode alone",
            bound=bound,
            bound_target=2,
        )
    )


def one_thread(contest: Contest) -> Contest:
    """All on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    contest.close = lambda: torch.set_num_threads(threads)
    return contest


# --- losses and scores ---
def random_batch(setting: Setting, h: Hierarchy | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, N, H, W) that ask for a gradient, and leaf labels with some void (B, H, W) uint8."""
    h, side = h or setting.hierarchy, setting.crops[-1]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(setting.batch, h.num_nodes, side, side, generator=generator)
    coarse = torch.randint(0, h.num_leaves + 1, (setting.batch, 1, side // 16, side // 16), generator=generator)
    values = torch.tensor([*h.leaves, h.ignore_index])
    labels = F.interpolate(values[coarse].float(), size=(side, side)).squeeze(1).to(torch.uint8)
    return logits.to(setting.device).requires_grad_(), labels.to(setting.device)


def forward_backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], None]:
    def run() -> None:
        logits.grad = None
        loss(logits).backward()

    return run


def shape_of(logits: Tensor) -> str:
    return " x ".join(map(str, logits.shape))


def bce_stage(setting: Setting) -> Iterator[Contest]:
    h = setting.hierarchy
    logits, labels = random_batch(setting)
    targets, labelled = baselines.multi_hot(labels, h)
    scale = 1 / labelled.sum()
    ready = lambda z: F.binary_cross_entropy_with_logits(z, targets, reduction="sum") * scale  # noqa: E731
    yield Contest(
        f"`bce` from labels, forward + backward, {shape_of(logits)}",
        "float multi-hot by look-ups, sigmoid, `binary_cross_entropy`",
        forward_backward(lambda z: baselines.bce(z, labels, h), logits),
        forward_backward(lambda z: LOSSES["bce"](z, labels, h), logits),
        target=2,
        bound_title="BCE-with-logits on a ready target",
        bound=forward_backward(ready, logits),
        bound_target=1.3,
    )


def tree_min_stage(setting: Setting) -> Iterator[Contest]:
    h = setting.hierarchy
    logits, labels = random_batch(setting)
    yield Contest(
        "`tree_min`, same",
        "min and max per node by index, then log",
        forward_backward(lambda z: baselines.tree_min(z, labels, h), logits),
        forward_backward(lambda z: LOSSES["tree_min"](z, labels, h), logits),
        target=10,
        bound_title="`bce`",
        bound=forward_backward(lambda z: LOSSES["bce"](z, labels, h), logits),
        bound_target=2,
    )


def scores_stage(setting: Setting) -> Iterator[Contest]:
    h = setting.hierarchy
    logits, labels = random_batch(setting)
    logits = logits.detach()
    plain_scores, our_scores = baselines.Scores(h), LevelScores(h, setting.device)
    yield Contest(
        "decode (`prob_sum`) + update all levels and violations",
        "scores, path sums, per level and class and / or",
        lambda: plain_scores.update(baselines.decode(logits, h), labels, logits),
        lambda: our_scores.update(DECODERS["prob_sum"](logits, h), labels, logits) is None or None,
        target=4,
        bound_title="one pass over the logits",
        bound=lambda: logits.amax() is None or None,
    )


# --- training ---
def training(setting: Setting, crop: int, **keys) -> tuple[TrainManager, list[Sample]]:
    """A training that stands before its first step, and the batches of one step."""
    name = f"train{crop}_{len(list(setting.folder.glob('experiments/*')))}"
    manager = TrainManager(config_for(setting, name, crop_size=crop, n_epochs=100000, **keys))
    manager.set_train_mode()
    manager.batches.start_at(0, 0)
    return manager, next(iter(manager._groups()))


def epoch_stage(setting: Setting) -> Iterator[Contest]:
    for crop in setting.crops:
        manager, group = training(setting, crop)

        def epoch(manager: TrainManager = manager) -> None:
            manager.epoch, manager.batch = manager.epoch + 1, 0
            manager._train_epoch()

        def steps(manager: TrainManager = manager, group: list[Sample] = group) -> None:
            for _ in range(manager.steps_per_epoch):
                manager.train_step(group)

        yield Contest(
            f"a training epoch, crop {crop}, batch {setting.batch}",
            "the same steps on a batch in memory",
            steps,
            epoch,
            target=0.95,
            bound_title="matrix products of as many FLOPs",
            bound=matmuls(setting, step_flops(manager, crop) * manager.steps_per_epoch),
            rounds=3,
            close=manager._close,
        )


def amp_stage(setting: Setting) -> Iterator[Contest]:
    """What `amp: bf16` brings on this machine; a CPU without instructions for it loses."""
    yield from (amp_contest(setting, crop) for crop in setting.crops)


def amp_contest(setting: Setting, crop: int) -> Contest:
    plain, batch = training(setting, crop, channels_last=True)
    mixed, _ = training(setting, crop, channels_last=True, amp="bf16")
    return Contest(
        f"a training step, crop {crop}, batch {setting.batch}, `channels_last` and `amp: bf16`",
        "the same in float32",
        lambda: plain.train_step(batch) is None or None,
        lambda: mixed.train_step(batch) is None or None,
        close=lambda: (plain._close(), mixed._close()),
    )


def step_flops(manager: TrainManager, crop: int) -> int:
    """Of forward and backward of one batch."""
    images = torch.randn(manager.config.batch_size, 3, crop, crop, device=manager.device)
    with FlopCounterMode(display=False) as counter:
        manager.learner.network(images).sum().backward()
    return counter.get_total_flops()


def matmuls(setting: Setting, flops: int, side: int = 1024) -> Callable[[], None]:
    a, b = torch.randn(2, side, side, device=setting.device)

    def run() -> None:
        for _ in range(max(1, round(flops / (2 * side**3)))):
            torch.mm(a, b)

    return run


def memory_stage(setting: Setting) -> Iterator[Contest]:
    def measured(which: str) -> Callable[[], float]:
        quick = ["--quick"] if setting.quick else []
        tool = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py"), "--device", setting.device.type, *quick]

        def run() -> float:
            done = subprocess.run([*tool, "--memory-of", which], capture_output=True, text=True, check=True)
            return float(done.stdout.split()[-1])

        return run

    yield Contest(
        f"peak memory of training, crop {setting.crops[-1]}, batch {setting.batch}",
        "plain U-Net, float multi-hot, plain `bce`",
        measured("plain"),
        measured("ours"),
        target=1 / 0.75,
        rounds=2,
        unit="bytes",
        note="beyond the loaded libraries; ours with `channels_last`",
    )


def peak_memory_of(which: str, setting: Setting) -> int:
    """Bytes that two training steps add to this process; meant for a process of its own."""
    h, side = setting.hierarchy, setting.crops[-1]
    before = peak_memory(setting.device)
    labels = random_batch(setting)[1]
    network = plain_network(h) if which == "plain" else HSEG(ENCODER, h.num_nodes)
    layout = torch.contiguous_format if which == "plain" else torch.channels_last  # as pascal_part_cpu.json trains
    network = network.to(setting.device, memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(setting.batch, 3, side, side, device=setting.device).contiguous(memory_format=layout)
    criterion = baselines.bce if which == "plain" else LOSSES["bce"]
    for _ in range(2):
        optimizer.zero_grad()
        criterion(network(images), labels, h).backward()
        optimizer.step()
    return max(1, peak_memory(setting.device) - before)  # small sizes fit what importing took


# --- evaluation ---
def evaluation_stage(setting: Setting) -> Iterator[Contest]:
    """As it comes, and with the network in bf16."""
    h = setting.hierarchy
    config = config_for(setting, "evaluated")
    torch.manual_seed(0)
    network = HSEG(ENCODER, h.num_nodes)
    state = {"model": network.state_dict(), "ema": None, "epoch": 1, "config": config.to_dict(), "tree": h.to_dict()}
    config.checkpoints_dir.mkdir(parents=True)
    write_whole(pack(state), config.checkpoints_dir / "best.pt")
    network = network.to(setting.device).eval()
    ours = copy.deepcopy(network).to(memory_format=torch.channels_last)
    files = find_samples(read_ids(config.ids_file("val")), config.images_dir, config.labels_dir)
    images = [torch.from_numpy(np.array(Image.open(f.photo).convert("RGB"))).permute(2, 0, 1) for f in files]

    def evaluate(amp: str) -> None:
        shutil.rmtree(config.experiment_dir / "evaluation", ignore_errors=True)
        with quiet():
            EvaluationManager(dataclasses.replace(config, amp=amp), EvaluationOptions("best")).run()

    def forward(amp: str) -> None:
        for image in images:
            photo_logits(ours, image.to(setting.device), tuple(image.shape[1:]), amp)

    for amp, words in (("off", ""), ("bf16", ", `amp: bf16`")):
        yield Contest(
            f"evaluate {len(files)} photos with pictures{words}",
            "one after the other, plain scores, pictures written in line",
            lambda: plain_evaluation(network, files, setting),
            lambda amp=amp: evaluate(amp),
            target=1.7,
            bound_title="forward alone",
            bound=lambda amp=amp: forward(amp),
            rounds=3,
        )


@torch.inference_mode()
def plain_evaluation(network: nn.Module, files: list, setting: Setting) -> None:
    """Reads, predicts, scores and draws one photo, then the next."""
    h, out = setting.hierarchy, setting.folder / "plain_pictures"
    out.mkdir(exist_ok=True)
    scores = baselines.Scores(h)
    for pair in files:
        with Image.open(pair.photo) as image:
            photo = np.array(image.convert("RGB"))
        labels = torch.from_numpy(read_labels(pair.labels)).unsqueeze(0).to(setting.device)
        image = torch.from_numpy(photo).permute(2, 0, 1).to(setting.device)
        logits = photo_logits(network, image, tuple(labels.shape[1:]))
        leaf = baselines.decode(logits, h)
        scores.update(leaf, labels, logits)
        answer = leaf[0].cpu().numpy()
        for level, name in enumerate(h.level_names):
            colours = visualize.colour_map(h.level_of(answer, level), h)
            Image.fromarray(colours).save(out / f"{pair.photo.stem}_{name}.png")
        Image.fromarray(visualize.overlay(photo, answer, h)).save(out / f"{pair.photo.stem}_overlay.jpg")


class quiet:
    """Keeps the tables and bars of what is measured off the screen."""

    def __enter__(self) -> None:
        self.streams = sys.stdout, sys.stderr
        self.sink = open("/dev/null", "w")
        sys.stdout = sys.stderr = self.sink

    def __exit__(self, *_) -> None:
        sys.stdout, sys.stderr = self.streams
        self.sink.close()


# --- the network ---
def plain_network(h: Hierarchy) -> nn.Module:
    return baselines.PlainUNet(ENCODER, h.num_nodes)


def network_stage(setting: Setting) -> Iterator[Contest]:
    """Training step and inference against U-Nets of the same encoder, same loss, same threads."""
    h = setting.hierarchy
    others = {"plain U-Net": plain_network(h)}
    try:
        import segmentation_models_pytorch as smp

        others["segmentation-models-pytorch `Unet`"] = smp.Unet(ENCODER, encoder_weights=None, classes=h.num_nodes)
    except ImportError:
        print("segmentation-models-pytorch is not installed (requirements-benchmark.txt); that row is left out")
    ours, side = HSEG(ENCODER, h.num_nodes), setting.crops[0]
    for name, other in others.items():
        share = parameters(ours) / parameters(other)
        for title, run in (("training step", train_step), ("inference", infer)):
            yield Contest(
                f"{title} of the network, {side} x {side}",
                name,
                run(other, setting, side),
                run(ours, setting, side),
                target=1,
                note=f"{share:.3f} of its parameters",
            )


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def train_step(network: nn.Module, setting: Setting, side: int) -> Callable[[], None]:
    network.to(setting.device)
    images = torch.randn(setting.batch, 3, side, side, device=setting.device)
    targets = (torch.rand(setting.batch, setting.hierarchy.num_nodes, side, side, device=setting.device) < 0.1).float()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(network(images), targets).backward()
        optimizer.step()

    return run


def infer(network: nn.Module, setting: Setting, side: int) -> Callable[[], None]:
    network.to(setting.device)
    image = torch.randn(1, 3, side, side, device=setting.device)

    def run() -> None:
        network.eval()
        with torch.inference_mode():
            network(image)

    return run


STAGES: dict[str, Callable[[Setting], Iterator[Contest]]] = {
    "encode": encode_stage,
    "load": load_stage,
    "bce": bce_stage,
    "tree_min": tree_min_stage,
    "scores": scores_stage,
    "epoch": epoch_stage,
    "amp": amp_stage,
    "evaluation": evaluation_stage,
    "memory": memory_stage,
    "network": network_stage,
}
