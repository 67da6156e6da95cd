"""Predicts photos with a checkpoint, which is all that it needs.

    python tools/predict.py photo.jpg                             # by the shipped model
    python tools/predict.py photo.jpg --checkpoint quickstart     # an experiment by its name or folder: its best
    python tools/predict.py holidays/ 'more/**/*.png' --checkpoint best.pt --out predicted --scores --tta flip

PATH is a photo, a folder (searched with all folders in it; what is no photo there is skipped, and said) or a glob.
Photos of any size and mode. --checkpoint may also be a folder that tools/export.py wrote. It writes

    <out>/level1_<name>/<photo>.png    node ids of each level, as a PNG in the tree's colours
    <out>/overlay/<photo>.jpg          the photo with its leaves laid over it, and a legend
    <out>/scores/<photo>.npz           with --scores: `scores` (nodes, height, width) float16, and `names`
    <out>/predictions.jsonl            one line a photo: its size, and the share of its pixels of every node

where <photo> is the photo's path below the folder that all photos share, without its suffix (with it, where two
photos differ in nothing else). A photo that cannot be read is named and left out; the exit status is then 1.
"""

import argparse
import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs.config import DECODE_RULES, TTA
from manage.inference import NotFinite, photo_named
from manage.predictor import Predictor, Result
from utils import visualize
from utils.cli import progress, run_main
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.images import PHOTO_SUFFIXES, write_indexed

SUFFIXES = (*PHOTO_SUFFIXES, ".tif", ".tiff", ".jfif", ".gif", ".ppm", ".pgm", ".jp2", ".tga")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="photos, folders, globs")
    parser.add_argument(
        "--checkpoint", metavar="F", help="a .pt file, experiment or export (default: the shipped model)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/predictions"), metavar="D", help="%(default)s")
    parser.add_argument("--scores", action="store_true", help="save the score map of every node too")
    parser.add_argument("--tta", choices=TTA, help="average over views: flip doubles the work, full is 17 times it")
    parser.add_argument("--tile", type=int, metavar="N", help="windows of N pixels; by default for large photos alone")
    parser.add_argument("--decode", choices=DECODE_RULES, help="another rule than the checkpoint's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier predictions in --out")
    return parser.parse_args()


def find_photos(paths: Sequence[str], out: Path) -> list[Path]:
    """The photos that files, folders and globs name, each once; nothing inside `out`, where predictions lie.

    Raises: UserError for a path that names nothing.
    """
    found: dict[Path, None] = {}
    skipped: Counter[str] = Counter()
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        photos = [photo for match in matches for photo in _photos_of(Path(os.path.abspath(match)), skipped)]
        if not photos:
            what = "holds no photo" if Path(path).is_dir() else "no such photo or folder, and no glob that matches one"
            raise UserError(f"{path}: {what} (photos end in {', '.join(SUFFIXES)})")
        found |= dict.fromkeys(photos)
    outside = [photo for photo in found if not photo.is_relative_to(os.path.abspath(out))]
    if not outside:
        raise UserError(f"all photos lie in {out}, where predictions are written; choose another --out")
    if skipped:
        print("skipped in folders: " + ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items())))
    return outside


def _photos_of(path: Path, skipped: Counter[str]) -> list[Path]:
    """Photos in a folder; counts what else is there by its suffix."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    photos = [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    others = set(files).difference(photos)
    skipped.update("hidden" if file.name.startswith(".") else file.suffix or "without a suffix" for file in others)
    return photos


def output_names(photos: Sequence[Path]) -> list[str]:
    """A name for each photo that no other has: its path below the folder that all share."""
    top = os.path.commonpath([photo.parent for photo in photos])
    names = [photo.relative_to(top) for photo in photos]
    if len({str(name.with_suffix("")).casefold() for name in names}) == len(names):
        names = [name.with_suffix("") for name in names]
    return [name.as_posix() for name in names]


class NotWritten(UserError):
    """The disk is full, or was taken away."""


class Output:
    """The files of one call.

    Raises: UserError when there are predictions already, or nothing can be written.
    """

    def __init__(self, folder: Path, hierarchy: Hierarchy, with_scores: bool) -> None:
        self.folder, self.hierarchy, self.with_scores = folder, hierarchy, with_scores
        names = [re.sub(r"[^\w-]+", "_", name) for name in hierarchy.level_names]  # a name may hold a slash
        self.levels = [f"level{level}_{name}" for level, name in enumerate(names, start=1)]
        self.lines = folder / "predictions.jsonl"

    def check_new(self, names: Sequence[str]) -> None:
        for path in (self.lines, *(path for name in names for path in self._paths(name))):
            if path.exists():
                raise UserError(f"{path} exists already; choose another --out, or replace it with --overwrite")

    def start(self) -> None:
        """An empty list of predictions."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lines.write_text("", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another --out") from None

    def write(self, photo: Path, name: str, result: Result) -> None:
        *levels, overlay, scores = self._paths(name)
        try:
            for path in (*levels, overlay, *([scores] if self.with_scores else [])):
                path.parent.mkdir(parents=True, exist_ok=True)
            for path, labels in zip(levels, result.levels, strict=True):
                write_indexed(path, labels, self.hierarchy.colours)
            picture = visualize.captioned_overlay(np.array(result.photo), result.leaves, self.hierarchy)
            Image.fromarray(picture).save(overlay, quality=90)
            if self.with_scores:
                np.savez_compressed(scores, scores=result.scores.astype(np.float16), names=self.hierarchy.names)
            height, width = result.leaves.shape
            line = {"photo": str(photo), "name": name, "width": width, "height": height, "shares": result.shares}
            with open(self.lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise NotWritten(f"{self.folder}: the prediction of {name} cannot be written ({error.strerror})") from None

    def _paths(self, name: str) -> list[Path]:
        """Level maps, overlay, scores. Not with_suffix: a name may hold a dot."""
        levels = [self.folder / level / f"{name}.png" for level in self.levels]
        return [*levels, self.folder / "overlay" / f"{name}.jpg", self.folder / "scores" / f"{name}.npz"]


def main() -> int:
    arguments = read_arguments()
    photos = find_photos(arguments.paths, arguments.out)
    names = output_names(photos)
    options = {"decode": arguments.decode, "tta": arguments.tta, "tile": arguments.tile}
    predictor = Predictor.load(arguments.checkpoint, arguments.device, **options)
    output = Output(arguments.out, predictor.hierarchy, arguments.scores)
    if not arguments.overwrite:
        output.check_new(names)
    output.start()
    faults = 0
    for photo, name in progress(list(zip(photos, names, strict=True)), desc="predict", unit="photo"):
        try:
            with photo_named(str(photo)):
                output.write(photo, name, predictor.predict_file(photo, keep_logits=arguments.scores))
        except (NotFinite, NotWritten):  # so would the next one be
            raise
        except UserError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            faults += 1
    left_out = f", {faults} left out" if faults else ""
    print(f"{len(photos) - faults} of {len(photos)} photos{left_out}, by {predictor}: {arguments.out}")
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)
