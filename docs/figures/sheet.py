"""Draws what a model makes of every N-th val photo, beside the truth, at every level: nobody picks the photos.

python docs/figures/sheet.py --cfg configs/pascal_part_cpu.json --every 300 --out docs/figures/pascal_part.png
python docs/figures/sheet.py --cfg configs/quickstart.json --checkpoint quickstart --every 9 --out sheet.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from configs.config import Config, load_config
from manage.predictor import Predictor
from utils import visualize
from utils.cli import run_main
from utils.dataset import find_samples
from utils.ids import read_ids
from utils.images import read_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", required=True, help="says where the val photos are")
    parser.add_argument("--checkpoint", metavar="C", help="a .pt file or an experiment (default: the shipped model)")
    parser.add_argument("--every", type=int, default=300, metavar="N", help="draw the 1st, (N + 1)th, ... val photo")
    parser.add_argument("--out", type=Path, required=True, metavar="F", help="the picture's file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides)
    sheet = draw_sheet(config, Predictor.load(arguments.checkpoint), arguments.every)
    Image.fromarray(sheet).quantize(256, dither=Image.Dither.NONE).save(arguments.out, optimize=True)
    print(f"wrote {arguments.out}")


def draw_sheet(config: Config, predictor: Predictor, every: int, side: int = 150) -> np.ndarray:
    """Rows of photo, truth and prediction at every level, with titles and legend. Shape: (h, w, 3) uint8."""
    hierarchy, titles, rows = predictor.hierarchy, ["photo"], []
    for name in hierarchy.level_names:
        titles += [f"{name}: truth", f"{name}: predicted"]
    for files in find_samples(read_ids(config.ids_file("val"))[::every], config.images_dir, config.labels_dir):
        result = predictor.predict_file(files.photo, keep_logits=False)
        pair = (visualize.level_maps(leaves, hierarchy, side) for leaves in (read_labels(files.labels), result.leaves))
        rows.append([result.photo, *(cell for level in zip(*pair, strict=True) for cell in level)])
    return visualize.gallery([[np.asarray(cell) for cell in row] for row in rows], titles, hierarchy, side)


if __name__ == "__main__":
    run_main(main)
