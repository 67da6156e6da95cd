"""Measures through training what each node of the tree is told: gradients, violations, calibration of background.

    python tools/diagnose.py losses_cpu_bce_seed0 losses_cpu_tree_min_seed0
    python tools/diagnose.py experiments/losses_cpu_*_seed* --photos 64 --out docs/diagnosis
    python tools/diagnose.py experiments/a/models_checkpoints/checkpoint_4.pt --criterion tree_min

Takes every checkpoint_<epoch>.pt of an experiment (keep them all: save_epoch=1, keep of at least n_epochs), or single
files. All are fed the same random views of the same training photos, and the gradients of several criteria by the
logits are measured there. Writes diagnosis.json and pictures. The network is the one that is evaluated: averaged
weights if there are any, in evaluation mode.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from configs.config import CRITERIA, REPOSITORY, Config, config_from_dict, without_gone
from manage.charts import line_chart
from manage.checkpoint import NUMBERED, load_checkpoint
from manage.comparison import criterion_name
from manage.data import read_split, train_loader
from manage.diagnostics import Diagnosis
from manage.network import restore_network
from utils.cli import progress, run_main
from utils.dataset import Draw, mix
from utils.errors import UserError
from utils.files import write_json
from utils.hierarchy import Hierarchy
from utils.losses import build_criterion
from utils.transforms import normalise

BATCH = 8
SAME_VIEWS = ("root_dir", "root_data_dir", "train_sample_ids_file", "n_train_photos", "short_side", "crop_size")
STANDARD = ("bce", "tree_min", {"tree_min": 1.0, "bce": 1.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="C", help="checkpoint files, or experiments")
    parser.add_argument("--photos", type=int, default=64, metavar="N", help="training photos (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of photos and views (%(default)s)")
    parser.add_argument("--criterion", choices=CRITERIA, help="measure this one, too")
    parser.add_argument("--out", type=Path, default=Path("outputs/diagnosis"), metavar="D", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.photos < 1:
        raise UserError(f"--photos {arguments.photos}: expected at least 1")
    points = [read_point(path) for path in find_checkpoints(arguments.checkpoints)]
    extra = [arguments.criterion] if arguments.criterion else []
    criteria = {criterion_name(spec): spec for spec in (*STANDARD, *(p.config.criterion for p in points), *extra)}
    batches = read_views(points, arguments.photos, arguments.seed)
    for point in progress(points, desc="checkpoints"):
        point.measured = measure(point, batches, criteria)
    write(points, batches, arguments.seed, arguments.out)


@dataclass
class Point:
    """One checkpoint of one run, and what was measured there."""

    path: Path
    config: Config
    epoch: int
    fingerprint: str
    measured: dict[str, Any] | None = None

    @property
    def criterion(self) -> str:
        return criterion_name(self.config.criterion)


# ---- checkpoints and photos --------------------------------------------------------------------------------------


def find_checkpoints(names: Sequence[str]) -> list[Path]:
    """Files as they are; of an experiment all checkpoint_<epoch>.pt, by epoch.

    Raises: UserError for a name that is neither.
    """
    paths: list[Path] = []
    for name in names:
        folders = [Path(name) / "models_checkpoints", REPOSITORY / "experiments" / name / "models_checkpoints"]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if Path(name).is_file():
            paths.append(Path(name))
        elif folder is None:
            raise UserError(f"{name}: neither a checkpoint nor an experiment (looked for {folders[0]})")
        else:
            numbered = sorted((int(m[1]), p) for p in folder.iterdir() if (m := NUMBERED.fullmatch(p.name)))
            if not numbered:
                raise UserError(f"{folder}: holds no checkpoint_<epoch>.pt; train with save_epoch=1")
            paths += [path for _, path in numbered]
    return paths


def read_point(path: Path) -> Point:
    state = load_checkpoint(path)
    config = config_from_dict(without_gone(state["config"], any_value=True), f"{path}, its config")
    return Point(path, config, state["epoch"], Hierarchy.from_dict(state["tree"], str(path)).fingerprint)


def read_views(points: Sequence[Point], count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The same views for all: batches of images (B, 3, S, S) and labels (B, S, S), bytes.

    Raises: UserError when the runs saw photos in different ways, or a photo cannot be read.
    """
    config = points[0].config
    for point in points[1:]:
        if point.fingerprint != points[0].fingerprint:
            raise UserError(f"{point.path}: has another tree than {points[0].path}")
        for key in SAME_VIEWS:
            if getattr(point.config, key) != getattr(config, key):
                raise UserError(f"{point.path}: {key} differs from that of {points[0].path}; diagnose them apart")
    hierarchy = restore_network(load_checkpoint(points[0].path), str(points[0].path))[1]
    photos = train_loader(config, hierarchy, 0, 1)[0].dataset
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    samples = [photos[Draw(index, mix(seed, index))] for index in progress(order, desc="photos", leave=False)]
    for sample in samples:
        if sample.fault:
            raise UserError(f"photo {read_split(config, 'train')[sample.index]!r}: {sample.fault}")
    groups = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    return [(torch.stack([s.image for s in group]), torch.stack([s.labels for s in group])) for group in groups]


def measure(point: Point, batches: Sequence[tuple[Tensor, Tensor]], criteria: dict[str, Any]) -> dict[str, Any]:
    """Everything about one checkpoint."""
    _, hierarchy, network = restore_network(load_checkpoint(point.path), str(point.path))
    gamma = point.config.gamma
    losses = {name: build_criterion(spec, hierarchy, gamma) for name, spec in criteria.items()}
    diagnosis = Diagnosis(hierarchy, losses)
    for images, labels in batches:
        with torch.inference_mode():
            logits = network(normalise(images))
        diagnosis.update(logits.clone(), labels)
    return diagnosis.summary()


# ---- results -----------------------------------------------------------------------------------------------------


def write(points: Sequence[Point], batches: Sequence[tuple[Tensor, Tensor]], seed: int, out: Path) -> None:
    """diagnosis.json and the pictures. Raises: UserError when `out` cannot be written."""
    record = {
        "photos": sum(len(images) for images, _ in batches),
        "seed": seed,
        "checkpoints": [
            {
                "experiment": point.config.exp_name,
                "criterion": point.criterion,
                "seed": point.config.seed,
                "epoch": point.epoch,
                **point.measured,
            }
            for point in points
        ],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, out / "diagnosis.json", indent=None)  # numbers by the thousand
        print(f"wrote {out / 'diagnosis.json'}")
        for path in draw(record["checkpoints"], out):
            print(f"wrote {path}")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None


def draw(checkpoints: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Per criterion the gradients of its own runs by node; for all criteria together violations and calibration."""
    by_criterion: dict[str, list[dict[str, Any]]] = {}
    for checkpoint in checkpoints:
        by_criterion.setdefault(checkpoint["criterion"], []).append(checkpoint)
    paths = []
    for criterion, own in by_criterion.items():
        for key, title, unit, factor in (
            ("share", "where a node on the label's path gets a gradient", "% of these pixels", 100),
            ("mean_size", "mean gradient of a node on the label's path", "size, by the logit", 1),
        ):
            series = {node: _through(own, _gradient(criterion, node, key), factor) for node in own[0]["calibration"]}
            path = out / f"{_file_name(criterion)}_gradient_{key}.png"
            paths += _chart(series, path, f"{criterion}: {title}", unit)
    rates = {name: _through(own, lambda c: c["violation_rate"], 100) for name, own in by_criterion.items()}
    paths += _chart(rates, out / "violation_rate.png", "violations of the tree", "% of (pixel, edge) pairs")
    node = _background(checkpoints[0])
    errors = {name: _through(own, lambda c: c["calibration"][node]["ECE"], 100) for name, own in by_criterion.items()}
    paths += _chart(errors, out / "calibration_error.png", f"calibration error of {node}", "ECE, % points")
    return [*paths, *_reliability(by_criterion, node, out)]


def _through(own: Sequence[dict[str, Any]], value, factor: float) -> list[tuple[float, float, float, float]]:
    """(epoch, mean, lowest, highest) over seeds."""
    by_epoch: dict[int, list[float]] = {}
    for checkpoint in own:
        if (number := value(checkpoint)) is not None:
            by_epoch.setdefault(checkpoint["epoch"], []).append(factor * number)
    return [(epoch, sum(v) / len(v), min(v), max(v)) for epoch, v in sorted(by_epoch.items())]


def _chart(series: dict[str, list[tuple[float, float, float, float]]], path: Path, title: str, unit: str) -> list[Path]:
    lines = {name: [(x, mean) for x, mean, _, _ in band] for name, band in series.items()}
    bands = {name: [(x, low, high) for x, _, low, high in band] for name, band in series.items()}
    if not any(lines.values()):
        return []
    line_chart(lines, path, title, "epoch", unit, bands)
    return [path]


def _reliability(by_criterion: dict[str, list[dict[str, Any]]], node: str, out: Path) -> list[Path]:
    """Score against share at the last epoch, of the first seed of each criterion."""
    series = {"perfect": [(0.0, 0.0), (1.0, 1.0)]}
    for criterion, own in by_criterion.items():
        seed = own[0]["seed"]
        last = max((c for c in own if c["seed"] == seed), key=lambda c: c["epoch"])
        series[criterion] = [(score, share) for score, share, _ in last["calibration"][node]["bins"]]
    path = out / "calibration.png"
    line_chart(series, path, f"calibration of {node} at the last epoch", "score", f"share of pixels that are {node}")
    return [path]


def _gradient(criterion: str, node: str, key: str):
    return lambda checkpoint: checkpoint["gradients"][criterion][node]["positive"][key]


def _background(checkpoint: dict[str, Any]) -> str:
    """The node whose calibration is drawn: background, or the most frequent one where there is none."""
    if checkpoint["background"]:
        return checkpoint["background"][0]
    calibration = checkpoint["calibration"]
    return max(calibration, key=lambda node: calibration[node]["share"] or 0.0)


def _file_name(criterion: str) -> str:
    return "_".join(criterion.replace("+", " ").split())


if __name__ == "__main__":
    run_main(main)
