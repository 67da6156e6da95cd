"""Draws a finished experiment for a write-up: curves from TensorBoard's own files, and a sheet of val photos.

    python docs/figures/result_figures.py --cfg configs/pascal_part_cpu.json --evaluation best --out docs/figures

The sheet shows `--photos` val photos, evenly spread over the list of ids, so that nobody picked them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.config import Config, load_config
from docs.figures.lines import line_chart
from manage.data import read_split
from manage.network import load_hierarchy
from utils import visualize
from utils.cli import run_main
from utils.dataset import find_samples
from utils.errors import UserError
from utils.images import read_labels, read_photo

CURVES = ("loss_train", "loss_val", "mIoU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", required=True, help="the experiment's config")
    parser.add_argument("--evaluation", default="best", help="folder under experiments/<exp_name>/evaluation")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="where the pictures go")
    parser.add_argument("--photos", type=int, default=6, help="rows of the sheet")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sheet = draw_sheet(config, arguments.evaluation, arguments.photos)
    path = arguments.out / f"{config.exp_name}_sheet.png"
    Image.fromarray(sheet).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}")
    for name, path in draw_curves(config, arguments.out).items():
        print(f"wrote {path} ({name})")


def draw_sheet(config: Config, evaluation: str, count: int, side: int = 150) -> np.ndarray:
    """Rows of photo, truth and prediction at every level, with titles and legend. Shape: (h, w, 3) uint8."""
    hierarchy = load_hierarchy(config)
    folder = config.experiment_dir / "evaluation" / evaluation / "pictures" / hierarchy.level_names[0]
    if not folder.is_dir():
        raise UserError(f"{folder}: no pictures there; run evaluate.py without --no-pictures first")
    ids = read_split(config, "val")
    chosen = [ids[i] for i in np.linspace(0, len(ids) - 1, count + 2).astype(int)[1:-1]]
    titles, rows = ["photo"], []
    for name in hierarchy.level_names:
        titles += [f"{name}: truth", f"{name}: predicted"]
    for sample_id, files in zip(chosen, find_samples(chosen, config.images_dir, config.labels_dir), strict=True):
        photo, truth = np.array(read_photo(files.photo)), read_labels(files.labels)
        predicted = read_labels(folder / f"{sample_id}.png")
        maps = (visualize.level_maps(labels, hierarchy, side) for labels in (truth, predicted))
        rows.append([photo, *(cell for pair in zip(*maps, strict=True) for cell in pair)])
    return visualize.gallery(rows, titles, hierarchy, side)


def draw_curves(config: Config, out: Path) -> dict[str, Path]:
    """One chart of the losses and one of the mIoUs, read from the event files that TensorBoard shows."""
    if not config.tensorboard_dir.is_dir():
        raise UserError(f"{config.tensorboard_dir}: no curves there; train the experiment first")
    events = EventAccumulator(str(config.tensorboard_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(CURVES) and "/" not in tag]
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    written = {}
    for title, stem in (("loss", "loss"), ("mIoU", "mIoU")):
        series = {tag: values for tag, values in points.items() if tag.startswith(stem)}
        if series:
            written[title] = out / f"{config.exp_name}_{title}.png"
            line_chart(series, written[title], title=f"{config.exp_name}: {title}", x_label="epoch", y_label=title)
    return written


if __name__ == "__main__":
    run_main(main)
