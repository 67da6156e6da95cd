"""Counts the teeth of predicted edges: runs of one pixel with the same label on both sides, per label change of a row.

    python docs/figures/teeth.py CHECKPOINT [--cfg F] [--photos 30]

At the network's own resolution (photos and labels at its short side), on val photos spread evenly over the list. Prints
the same of the truth, and how many more changes lie inside cells of 2 pixels than between them (1.0: no grid is seen).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.config import load_config
from manage.predictor import Predictor
from utils.ids import read_ids
from utils.images import read_photo, scaled_size


def teeth(leaves: np.ndarray) -> tuple[int, int, int, int]:
    """Changes along rows, one-pixel runs, changes inside cells of 2 pixels, changes between cells."""
    change = leaves[:, 1:] != leaves[:, :-1]  # change[:, x]: between x and x + 1
    single = change[:, :-1] & change[:, 1:] & (leaves[:, :-2] == leaves[:, 2:])
    return change.sum(), single.sum(), change[:, ::2].sum(), change[:, 1::2].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--cfg", default="configs/pascal_part_cpu.json", help="where the data are")
    parser.add_argument("--photos", type=int, default=30)
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.cfg, overrides)
    predictor = Predictor.load(arguments.checkpoint)
    ids = read_ids(config.ids_file("val"))
    counts = {"predicted": np.zeros(4), "truth": np.zeros(4)}
    for name in ids[:: max(1, len(ids) // arguments.photos)][: arguments.photos]:
        photo = read_photo(next(Path(config.images_dir).glob(f"{name}.*")), predictor.config.short_side)
        counts["predicted"] += teeth(predictor(photo, keep_logits=False).leaves)
        with Image.open(next(Path(config.labels_dir).glob(f"{name}.*"))) as mask:
            labels = mask.resize(scaled_size(mask.size, predictor.config.short_side), Image.Resampling.NEAREST)
        counts["truth"] += teeth(np.asarray(labels))
    for what, (changes, single, inside, between) in counts.items():
        ratio = inside / between
        print(f"{what}: {changes:.0f} changes, {single / changes:.1%} of them teeth, inside/between {ratio:.2f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
