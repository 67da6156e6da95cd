"""Measures through training what each node of the tree is told: gradients, violations, calibration of background.

    python docs/figures/diagnose.py losses_cpu_bce_seed0 losses_cpu_tree_min_seed0
    python docs/figures/diagnose.py experiments/losses_cpu_*_seed* --photos 64 --out docs/diagnosis
    python docs/figures/diagnose.py experiments/a/models_checkpoints/checkpoint_4.pt --criterion tree_min

Takes every checkpoint_<epoch>.pt of an experiment (keep them all: save_epoch=1, keep of at least n_epochs), or single
files. All are fed the same random views of the same training photos, and the gradients of several criteria by the
logits are measured there. Writes diagnosis.json and pictures. The network is the one that is evaluated: averaged
weights if there are any, in evaluation mode.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
from torch import Tensor

from configs.config import CRITERIA, REPOSITORY, Config, config_from_dict
from docs.figures.lines import line_chart
from manage.checkpoint import NUMBERED, load_checkpoint
from manage.comparison import criterion_name
from manage.data import read_split, train_loader
from manage.network import restore_network
from utils.cli import progress, run_main
from utils.dataset import Draw, mix
from utils.errors import UserError
from utils.files import write_json
from utils.hierarchy import Hierarchy
from utils.losses import Criterion, build_criterion

BATCH = 8
BINS = 10  # of a score
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
    config = config_from_dict(state["config"], f"{path}, its config", is_record=True)
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
    loader, _ = train_loader(config, hierarchy, 0, 1)
    order = torch.randperm(len(loader.photos), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    batches = []
    for i in progress(range(0, len(order), BATCH), desc="photos", leave=False):
        batch = next(loader.of([[Draw(index, mix(seed, index)) for index in order[i : i + BATCH]]]))
        for index, fault in zip(batch.index.tolist(), batch.fault, strict=True):
            if fault:
                raise UserError(f"photo {read_split(config, 'train')[index]!r}: {fault}")
        batches.append((batch.image, batch.labels))
    return batches


def measure(point: Point, batches: Sequence[tuple[Tensor, Tensor]], criteria: dict[str, Any]) -> dict[str, Any]:
    """Everything about one checkpoint."""
    _, hierarchy, network = restore_network(load_checkpoint(point.path), str(point.path))
    gamma = point.config.gamma
    losses = {name: build_criterion(spec, hierarchy, gamma) for name, spec in criteria.items()}
    diagnosis = Diagnosis(hierarchy, losses)
    for images, labels in batches:
        with torch.inference_mode():
            logits = network(images)
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


def _through(own: Sequence[dict[str, Any]], value, factor: float) -> list[tuple[float, float]]:
    """(epoch, mean over seeds)."""
    by_epoch: dict[int, list[float]] = {}
    for checkpoint in own:
        if (number := value(checkpoint)) is not None:
            by_epoch.setdefault(checkpoint["epoch"], []).append(factor * number)
    return [(epoch, sum(v) / len(v)) for epoch, v in sorted(by_epoch.items())]


def _chart(series: dict[str, list[tuple[float, float]]], path: Path, title: str, unit: str) -> list[Path]:
    if not any(series.values()):
        return []
    line_chart(series, path, title, "epoch", unit)
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


# ---- sums over the labelled pixels of any number of batches ------------------------------------------------------


class Diagnosis:
    """Sums over pixels for one network and several criteria.

    A gradient here is that of a pixel's own loss by a node's logit, before it is divided by the number of pixels.
    It is looked at apart where the node is on the label's path ("positive") and where it is on none ("negative").
    """

    def __init__(self, h: Hierarchy, criteria: Mapping[str, Criterion]) -> None:
        self.h, self.criteria = h, criteria
        self.gradients = {name: torch.zeros(2, 2, h.num_nodes, dtype=torch.float64) for name in criteria}
        self.pixels = torch.zeros(2, h.num_nodes, dtype=torch.float64)  # positive, negative
        self.violations = torch.zeros(len(h.edges), dtype=torch.float64)
        self.labelled = 0
        self.bins = torch.zeros(3, h.num_nodes, BINS, dtype=torch.float64)  # pixels, sum of scores, positive pixels

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch. Shape: (B, N, H, W), (B, H, W)."""
        logits = logits.detach().float().cpu()
        labels = labels.cpu()
        signs = self.h.signs("cpu")[:, self.h.index_of(labels).flatten()]  # (N, P)
        is_label = labels.flatten() != self.h.ignore_index
        self.labelled += int(is_label.sum())
        self.pixels += torch.stack([(signs > 0).sum(1), (signs < 0).sum(1)])
        for name, criterion in self.criteria.items():
            self._add_gradients(name, pixel_gradients(criterion, logits, labels, self.h), signs)
        flat = logits.transpose(0, 1).flatten(1)  # (N, P)
        parents, children = self.h.edge_index("cpu")
        violated = (flat[children] > 0) & (flat[parents] <= 0) & is_label
        self.violations += violated.sum(1)
        self._add_calibration(flat.sigmoid(), signs)

    def _add_gradients(self, name: str, gradients: Tensor, signs: Tensor) -> None:
        """[where it is not 0, its mean size] x [positive, negative] x node."""
        for side, of_side in enumerate((signs > 0, signs < 0)):
            sizes = gradients.abs() * of_side
            self.gradients[name][0, side] += (sizes > 0).sum(1)
            self.gradients[name][1, side] += sizes.sum(1, dtype=torch.float64)

    def _add_calibration(self, scores: Tensor, signs: Tensor) -> None:
        index = (scores * BINS).long().clamp_(max=BINS - 1)
        known = signs != 0
        for row, values in enumerate((known, scores * known, signs > 0)):
            self.bins[row].scatter_add_(1, index, values.double())

    def summary(self) -> dict[str, Any]:
        """Plain JSON types, by node name; None where nothing was seen."""
        names = self.h.names
        edges = {names[child]: self._rate(self.violations[e]) for e, (_, child) in enumerate(self.h.edges)}
        pairs = self.labelled * len(self.h.edges)
        return {
            "pixels": self.labelled,
            "background": [names[v] for v in sorted(self.h.background)],
            "gradients": {name: self._gradient_summary(name) for name in self.criteria},
            "violation_rate": float(self.violations.sum()) / pairs if pairs else None,
            "violations": edges,
            "calibration": {names[v]: self._calibration(v) for v in range(self.h.num_nodes)},
        }

    def _gradient_summary(self, criterion: str) -> dict[str, Any]:
        share, size = (self.gradients[criterion] / self.pixels).tolist()  # NaN where there is no such pixel
        return {
            name: {
                side: {"pixels": int(self.pixels[s, v]), "share": _known(share[s][v]), "mean_size": _known(size[s][v])}
                for s, side in enumerate(("positive", "negative"))
            }
            for v, name in enumerate(self.h.names)
        }

    def _calibration(self, v: int) -> dict[str, Any]:
        """Mean score against share of pixels, over all and in bins of the score; ECE is their mean distance."""
        pixels, scores, positives = self.bins[:, v]
        total = float(pixels.sum())
        filled = pixels > 0
        table = torch.stack([scores[filled] / pixels[filled], positives[filled] / pixels[filled], pixels[filled]], 1)
        if not total:
            return {"mean_score": None, "share": None, "ECE": None, "bins": []}
        return {
            "mean_score": float(scores.sum()) / total,
            "share": float(positives.sum()) / total,
            "ECE": float((scores - positives).abs().sum()) / total,
            "bins": table.tolist(),
        }

    def _rate(self, count: Tensor) -> float | None:
        return float(count) / self.labelled if self.labelled else None


def pixel_gradients(criterion: Criterion, logits: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    """Gradient of each pixel's own loss by its logits. Shape: (B, N, H, W), (B, H, W) -> (N, B * H * W)."""
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(logits, labels), logits)
    labelled = (labels != h.ignore_index).sum()  # the criterion is a mean over these
    return (gradient * labelled).transpose(0, 1).flatten(1)


def _known(value: float) -> float | None:
    return value if value == value else None  # NaN is not equal to itself


if __name__ == "__main__":
    run_main(main)
