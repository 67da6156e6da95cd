"""Fits root_bias: an offset for each root of the tree, added to its leaves before the best is taken.

    python tools/fit_decode.py --cfg configs/quickstart.json
    python tools/fit_decode.py --cfg F --checkpoint best --decode prob_sum --photos 200 seed=1

mIoU without background rewards a guess at a body part, so a rule that is best for pixel accuracy need not be best
for it. The offset is fitted on train photos, never on val: three quarters of a seeded sample are fitted, the last
quarter says whether the gain holds on photos that were not fitted. (The network was trained on both, so expect less
on val; only evaluate.py can tell.)

It writes a copy of the checkpoint with the rule and the offset in its config to
<folder of the checkpoint>/fitted/<checkpoint>_<rule>.pt; evaluate.py, predict.py and export.py use what stands there.
Where nothing is gained on the photos that were not fitted, it says so and writes nothing. The checkpoint itself is left
as it is. Only differences between roots count: the first root keeps 0.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
from torch import Tensor

from configs.config import DECODE_RULES, Config, load_config
from manage.checkpoint import find_checkpoint, load_checkpoint, pack
from manage.data import check_data, read_split
from manage.predictor import Predictor
from utils.cli import progress, run_main
from utils.dataset import find_samples
from utils.decode import leaf_bias, leaf_scores
from utils.errors import UserError
from utils.files import write_whole
from utils.hierarchy import Hierarchy
from utils.images import read_labels
from utils.metrics import confusion, scores_from_confusion

UNITS = {"prob_sum": 0.2, "prob_mean": 0.1}  # a coarse step, in the unit of the rule's score; of logits it is 1
STEPS, REACH = (1, 0.2, 0.05), 10  # from coarse to fine, and how many to either side
PIXELS_PER_PHOTO = 10_000
TARGET = "mIoU1"  # the score that is maximised

Pixels = tuple[Tensor, Tensor]  # labels (P,), and the score of each leaf (leaves, P)


def decide(scores: Tensor, bias: Tensor, h: Hierarchy) -> Tensor:
    """The leaf of each pixel under an offset per root. Shape: (leaves, P), (R,) -> (P,)."""
    best = (scores + leaf_bias(bias, h, scores.device, scores.dtype)).max(0).indices
    return h.leaf_index(scores.device)[best]


def score(pixels: Pixels, bias: Tensor, h: Hierarchy) -> float:
    labels, scores = pixels
    return scores_from_confusion(confusion(decide(scores, bias, h), labels, h), h)[TARGET] or 0.0


def fit(pixels: Pixels, unit: float, h: Hierarchy) -> Tensor:
    """The offset of each root that maximises the score, found one root at a time; of equals the one next to 0."""
    bias = torch.zeros(len(h.roots))
    best = score(pixels, bias, h)
    for step in STEPS:
        before = -1.0
        while best > before:
            before = best
            for root in range(1, len(h.roots)):
                grid = bias[root] + step * unit * torch.arange(-REACH, REACH + 1)
                for offset in sorted(grid.tolist(), key=abs):
                    tried = bias.clone()
                    tried[root] = round(offset, 4)
                    if (found := score(pixels, tried, h)) > best + 1e-9:
                        best, bias = found, tried
    return bias


def sample(predictor: Predictor, config: Config, n_photos: int) -> Iterator[Pixels]:
    """A random part of the labelled pixels of a sample of train photos. Raises: UserError where one is in val."""
    h, generator = predictor.hierarchy, torch.Generator().manual_seed(config.seed)
    train = read_split(config, "train")
    if shared := {*train} & {*read_split(config, "val")}:
        raise UserError(f"{len(shared)} train ids are in val, too; an offset fitted on val photos spoils their scores")
    ids = [train[i] for i in torch.randperm(len(train), generator=generator)[: max(4, n_photos)].tolist()]
    for file in progress(find_samples(ids, config.images_dir, config.labels_dir), desc="predict", unit="photo"):
        labels = torch.from_numpy(read_labels(file.labels)).flatten()
        known = (labels != h.ignore_index).nonzero().flatten()
        chosen = known[torch.randperm(len(known), generator=generator)[:PIXELS_PER_PHOTO]]
        logits = predictor.predict_file(file.photo).logits.flatten(1)[:, chosen].float()
        yield labels[chosen], leaf_scores(predictor.decoding.rule, logits, h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="config of the training (default: that of config.py)")
    parser.add_argument("--checkpoint", default="best", metavar="C", help="best (default), last, or a path")
    parser.add_argument("--decode", choices=DECODE_RULES, help="the rule to fit (default: the checkpoint's own)")
    parser.add_argument("--photos", type=int, default=200, metavar="N", help="train photos to use, 4 or more (200)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for this run")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides)
    path = find_checkpoint(arguments.checkpoint, config.checkpoints_dir, config.root)
    predictor = Predictor.load(path, config.device, decode=arguments.decode, root_bias={}, tta="off")
    h, rule = predictor.hierarchy, predictor.decoding.rule
    fitted = path.parent / "fitted" / f"{path.stem}_{rule}.pt"  # not beside it, where a resume looks for checkpoints
    if fitted.exists():
        raise UserError(f"{fitted} exists already; move it away to fit again")
    check_data(config, h)
    parts = list(sample(predictor, config, arguments.photos))
    split = 3 * len(parts) // 4
    used, held_out = (tuple(torch.cat(x, -1) for x in zip(*p, strict=True)) for p in (parts[:split], parts[split:]))
    offsets, none = fit(used, UNITS.get(rule, 1.0), h), torch.zeros(len(h.roots))
    for name, pixels in ((f"the {split} train photos fitted", used), (f"{len(parts) - split} others", held_out)):
        before, after = score(pixels, none, h), score(pixels, offsets, h)
        print(f"{TARGET} on {name}: {100 * before:.2f} % -> {100 * after:.2f} %")
    if after <= before:
        print("no gain on photos that were not fitted: nothing was written, decode as before")
        return
    bias = {h.names[root]: round(offset, 4) for root, offset in zip(h.roots, offsets.tolist(), strict=True) if offset}
    state = load_checkpoint(path)
    state["config"] |= {"decode": rule, "root_bias": bias}
    fitted.parent.mkdir(exist_ok=True)
    write_whole(pack(state), fitted)
    cfg = ["--cfg", arguments.cfg] if arguments.cfg else []
    others = [word for word in arguments.overrides if not word.startswith(("decode=", "root_bias="))]
    command = shlex.join(["python", "evaluate.py", *cfg, "--checkpoint", str(fitted), *others])
    print(f"wrote {fitted}, with {rule} and root_bias {bias}; to score it on val:\n  {command}")


if __name__ == "__main__":
    run_main(main)
