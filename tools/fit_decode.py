"""Fits root_bias: an offset for each root of the tree, added to its leaves before the best is taken.

    python tools/fit_decode.py --cfg configs/quickstart.json
    python tools/fit_decode.py --cfg F --checkpoint best --decode prob_sum --target mIoU1 --photos 200

mIoU without background rewards a guess at a body part, so a rule that is best for pixel accuracy need not be best
for it. The offset is fitted on train photos, never on val: three quarters of a seeded sample are fitted, the last
quarter says whether the gain holds on photos that were not fitted. (The network was trained on both, so expect less
on val; only evaluate.py can tell.)

It prints the offset as an override, and writes a copy of the checkpoint with the rule and the offset in its config to
<folder of the checkpoint>/fitted/<checkpoint>_<rule>.pt; evaluate.py, predict.py and export.py use what stands there.
Where nothing is gained on the photos that were not fitted, it says so and writes nothing. The checkpoint itself is left
as it is. Only differences between roots count: the first root keeps 0.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
from torch import Tensor

from configs.config import DECODE_RULES, Config, load_config, parse_overrides
from manage import distributed
from manage.checkpoint import find_checkpoint, load_checkpoint, pack
from manage.data import Tolerance, check_data, read_split, val_loader
from manage.evaluation_manager import predictions
from manage.network import check_same_network, load_hierarchy, restore_network
from manage.predictor import Decoding
from utils.cli import progress, run_main
from utils.decode import leaf_scores
from utils.errors import UserError
from utils.files import write_whole
from utils.hierarchy import Hierarchy
from utils.metrics import scores_from_confusion

STEPS = {"prob_sum": 0.01, "prob_mean": 0.005}  # of the grid of offsets, in the unit of the rule's score
LOGIT_STEP = 0.05
HALF_GRID = 200  # steps to either side of 0
PIXELS_PER_PHOTO = 20_000
MAX_ROUNDS = 5


@dataclass
class Pixels:
    """A sample of labelled pixels: the label, and for each root its best leaf and that leaf's score.

    Shape: (P,), (R, P), (R, P).
    """

    labels: Tensor
    leaves: Tensor
    scores: Tensor


def best_by_root(rule: str, logits: Tensor, h: Hierarchy) -> tuple[Tensor, Tensor]:
    """Each root's best leaf and its score: all that an offset per root can still decide between.

    Shape: (N, P) -> (R, P) and (R, P).
    """
    scores = leaf_scores(rule, logits.clone(), h)
    leaves, best = [], []
    for root in h.roots:
        rows = torch.tensor([row for row, leaf in enumerate(h.leaves) if h.paths[leaf][0] == root])
        of_root = scores[rows]
        best.append(of_root.amax(0))
        leaves.append(torch.tensor(h.leaves)[rows][of_root.max(0).indices])
    return torch.stack(leaves), torch.stack(best)


def decide(pixels: Pixels, bias: Tensor) -> Tensor:
    """The leaf of each pixel under an offset per root. Shape: (R,) -> (P,)."""
    winner = (pixels.scores + bias[:, None]).max(0).indices
    return pixels.leaves.gather(0, winner[None])[0]


def count(labels: Tensor, leaves: Tensor, n: int) -> Tensor:
    """Shape: (P,), (P,) -> (n, n) int64."""
    return torch.bincount(labels * n + leaves, minlength=n * n).view(n, n)


def sweep(pixels: Pixels, bias: Tensor, root: int, grid: Tensor, n: int) -> Tensor:
    """The confusion matrix at every offset of one root, the others' being fixed: one pass over the pixels.

    A pixel goes to the root from the first offset on that exceeds its margin, so counting pixels by that offset and
    adding up along the grid gives all matrices.

    Shape: -> (K, n, n) int64.
    """
    others = pixels.scores + bias[:, None]
    others[root] = -torch.inf
    winner = others.max(0).indices
    margin = others.amax(0) - pixels.scores[root]
    first = torch.searchsorted(grid, margin, right=True)  # (P,), K where no offset is enough
    steps, cell = len(grid) + 1, first * n * n + pixels.labels * n

    def by_step(leaves: Tensor) -> Tensor:
        return torch.bincount(cell + leaves, minlength=steps * n * n).view(steps, n, n)

    gained, lost = by_step(pixels.leaves[root]), by_step(pixels.leaves.gather(0, winner[None])[0])
    return gained.cumsum(0)[:-1] + lost.sum(0) - lost.cumsum(0)[:-1]


def value(matrix: Tensor, target: str, h: Hierarchy) -> float:
    score = scores_from_confusion(matrix, h)[target]
    return -1.0 if score is None else score


def fit(pixels: Pixels, target: str, step: float, h: Hierarchy) -> list[float]:
    """The offset of each root that maximises the target, found one root at a time; of equals the one next to 0."""
    grid = step * torch.arange(-HALF_GRID, HALF_GRID + 1)
    near_zero_first = sorted(range(len(grid)), key=lambda k: abs(k - HALF_GRID))
    bias = torch.zeros(len(h.roots))
    best = value(count(pixels.labels, decide(pixels, bias), h.num_nodes), target, h)
    for _ in range(MAX_ROUNDS):
        before = best
        for root in range(1, len(h.roots)):
            matrices = sweep(pixels, bias, root, grid, h.num_nodes)
            for k in near_zero_first:
                score = value(matrices[k], target, h)
                if score > best + 1e-9:
                    best, bias[root] = score, grid[k]
        if best <= before:
            break
    return [round(offset, 4) for offset in bias.tolist()]


def sample(photos: Iterable, rule: str, h: Hierarchy, seed: int) -> Iterator[Pixels]:
    """A random part of each photo's labelled pixels."""
    generator = torch.Generator().manual_seed(seed)
    for prediction in photos:
        labels = prediction.labels.flatten().cpu().long()
        known = (labels != h.ignore_index).nonzero().flatten()
        chosen = known[torch.randperm(len(known), generator=generator)[:PIXELS_PER_PHOTO]].sort().values
        width, parts = prediction.labels.shape[1], []
        for rows, logits in prediction.bands:
            inside = chosen[(chosen >= rows.start * width) & (chosen < rows.stop * width)] - rows.start * width
            parts.append(logits[0].flatten(1)[:, inside.to(logits.device)].cpu())
        yield Pixels(labels[chosen], *best_by_root(rule, torch.cat(parts, dim=1), h))


def join(parts: list[Pixels]) -> Pixels:
    return Pixels(*(torch.cat(values, dim=-1) for values in zip(*(vars(p).values() for p in parts), strict=True)))


def choose_ids(config: Config, n_photos: int, seed: int) -> list[str]:
    """A seeded sample of train ids, none of which is a val id.

    Raises: UserError when there are too few, or one is in val.
    """
    train, val = read_split(config, "train"), set(read_split(config, "val"))
    if shared := sorted(val.intersection(train)):
        raise UserError(
            f"{len(shared)} train ids are in val, too (the first: {shared[0]}); an offset fitted on val photos "
            "would spoil their scores. Use a config whose id lists share no photo"
        )
    if min(n_photos, len(train)) < 4:
        raise UserError(f"{min(n_photos, len(train))} photos are too few to fit and to check; expected at least 4")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:n_photos]
    return [train[i] for i in order.tolist()]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="config of the training (default: that of config.py)")
    parser.add_argument("--checkpoint", default="best", metavar="C", help="best (default), last, or a path")
    parser.add_argument("--decode", choices=DECODE_RULES, help="the rule to fit (default: the checkpoint's own)")
    parser.add_argument("--target", default="mIoU1", help="score to maximise (default mIoU1)")
    parser.add_argument("--photos", type=int, default=200, metavar="N", help="train photos to use (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of photos and pixels (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier fitted copy")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for this run")
    return parser.parse_intermixed_args()


def check_target(target: str, h: Hierarchy) -> None:
    levels = range(1, h.num_levels + 1)
    names = [f"mIoU{level}{end}" for level in levels for end in ("", "_with_background")] + ["pixel_accuracy"]
    if target not in names:
        raise UserError(f"--target {target}: expected one of {', '.join(names)}")
    if len(h.roots) < 2:
        raise UserError(f"the tree {h.name!r} has one root, so an offset per root changes nothing")


def report(name: str, pixels: Pixels, bias: Tensor, target: str, h: Hierarchy) -> bool:
    """Prints the target without and with the offset; whether it gains."""
    before, after = (
        value(count(pixels.labels, decide(pixels, offsets), h.num_nodes), target, h)
        for offsets in (torch.zeros_like(bias), bias)
    )
    print(f"{target} on {name}: {100 * before:.2f} -> {100 * after:.2f}{'' if after > before else ', no gain'}")
    return after > before


def evaluation_command(arguments: argparse.Namespace, checkpoint: Path, rule: str, bias: dict[str, float]) -> str:
    """The line for a shell that scores the offset with the config and overrides of this call."""
    cfg = ["--cfg", arguments.cfg] if arguments.cfg else []
    kept = [override for override in arguments.overrides if override.partition("=")[0] not in ("decode", "root_bias")]
    fitted = [f"decode={rule}", f"root_bias={json.dumps(bias)}"]
    return shlex.join(["python", "evaluate.py", *cfg, "--checkpoint", str(checkpoint), *kept, *fitted])


def main() -> None:
    arguments = read_arguments()
    config = load_config(arguments.cfg, arguments.overrides)
    hierarchy = load_hierarchy(config)
    check_target(arguments.target, hierarchy)
    path = find_checkpoint(arguments.checkpoint, config.checkpoints_dir, config.root)
    state = load_checkpoint(path)
    trained_with, _, network = restore_network(state, str(path))
    rule = Decoding.of(trained_with, arguments.decode or parse_overrides(arguments.overrides).get("decode")).rule
    fitted = path.parent / "fitted" / f"{path.stem}_{rule}.pt"  # not beside it, where a resume looks for checkpoints
    if fitted.exists() and not arguments.overwrite:
        raise UserError(f"{fitted} exists already; give --overwrite to fit again")
    check_same_network(config, hierarchy, state, str(path))
    check_data(config, hierarchy)
    ids = choose_ids(config, arguments.photos, arguments.seed)
    device = distributed.choose_device(config.device)
    config.short_side = trained_with.short_side
    loader, tolerance = val_loader(config, hierarchy, ids), Tolerance(config.skip_unreadable, ids)
    with torch.inference_mode(), progress(total=len(loader), desc="predict", unit="photo") as bar:
        seen = predictions(network.to(device), loader, device, tolerance, {"amp": config.amp}, bar)
        parts = list(sample(seen, rule, hierarchy, arguments.seed))
    if len(parts) < 4:
        raise UserError(f"only {len(parts)} photos could be read; expected at least 4, to fit and to check")
    split = 3 * len(parts) // 4
    used, held_out = join(parts[:split]), join(parts[split:])
    offsets = fit(used, arguments.target, STEPS.get(rule, LOGIT_STEP), hierarchy)
    named = {hierarchy.names[root]: offset for root, offset in zip(hierarchy.roots, offsets, strict=True) if offset}
    report(f"the {split} train photos that were fitted", used, torch.tensor(offsets), arguments.target, hierarchy)
    held = len(parts) - split
    gains = report(f"{held} other train photos", held_out, torch.tensor(offsets), arguments.target, hierarchy)
    if max(map(abs, offsets)) >= HALF_GRID * STEPS.get(rule, LOGIT_STEP) - 1e-6:
        print("warning: an offset lies at the edge of the range that was searched; the scores may not be trained yet")
    if not gains:
        print("no gain on photos that were not fitted: nothing was written, decode as before")
        return
    state["config"] |= {"decode": rule, "root_bias": named}
    try:
        fitted.parent.mkdir(exist_ok=True)
        write_whole(pack(state), fitted)
    except OSError as error:
        raise UserError(f"{fitted}: cannot be written ({error.strerror})") from None
    print(f"wrote {fitted}; to score it on val:")
    print(f"  {evaluation_command(arguments, path, rule, named)}")


if __name__ == "__main__":
    run_main(main)
