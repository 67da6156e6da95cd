"""Predicts photos with a checkpoint, which is all that it needs.

    python tools/predict.py photo.jpg                             # by the shipped model
    python tools/predict.py photo.jpg --checkpoint quickstart     # an experiment by its name or folder: its best
    python tools/predict.py holidays/ 'more/**/*.png' --checkpoint best.pt --out predicted --scores --tta flip

PATH is a photo, a folder (searched with all folders in it; what is no photo there is skipped, and said) or a glob.
Photos of any size and mode. --checkpoint may also be a folder that tools/export.py wrote. It writes

    <out>/<level>/<photo>.png      node ids of each level, as a PNG in the tree's colours
    <out>/overlay/<photo>.jpg      the photo with its leaves laid over it, at its own size, and a legend
    <out>/scores/<photo>.npz       with --scores: `scores` (nodes, height, width) float16, and `names`
    <out>/predictions.jsonl        one line a photo: its size, and the share of its pixels of every node

where <photo> is the photo's path below the folder that all photos share, without its suffix (with it, where two
photos differ in nothing else). A photo that cannot be read is named and left out; the exit status is then 1.
"""

import argparse
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from configs.config import DECODE_RULES, TTA
from manage.inference import NotFinite, photo_named
from manage.predictor import Predictor, Result
from utils.cli import progress, run_main
from utils.errors import UserError
from utils.images import PHOTO_SUFFIXES
from utils.visualize import write_maps

SUFFIXES = (*PHOTO_SUFFIXES, ".tif", ".tiff", ".jfif", ".gif", ".ppm", ".pgm", ".jp2", ".tga")


def find_photos(paths: Sequence[str]) -> list[Path]:
    """The photos that files, folders and globs name, each once; none of the pictures of earlier predictions.

    Raises: UserError for a path that names nothing.
    """
    found: dict[Path, None] = {}
    skipped: Counter[str] = Counter()
    for path in paths:
        matches, photos = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)), []
        for match in map(Path, map(os.path.abspath, matches)):
            earlier = {lines.parent for lines in match.rglob("predictions.jsonl")}
            inside = [file for file in sorted(match.rglob("*")) if not earlier & {*file.parents}]
            for file in inside if match.is_dir() else [match]:
                is_hidden = "/." in f"/{file.relative_to(match).as_posix()}"
                if file == match or (file.suffix.lower() in SUFFIXES and not is_hidden):
                    photos.append(file)
                elif file.is_file():
                    skipped["hidden" if is_hidden else file.suffix or "without a suffix"] += 1
        if not photos:
            raise UserError(
                f"{path}: no such photo, no folder that holds one (but of earlier predictions), no glob that matches"
            )
        found |= dict.fromkeys(photos)
    if skipped:
        print("skipped in folders: " + ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items())))
    return list(found)


def output_names(photos: Sequence[Path]) -> list[str]:
    """A name for each photo that no other has: its path below the folder that all share."""
    top = os.path.commonpath([photo.parent for photo in photos])
    names = [photo.relative_to(top) for photo in photos]
    if len({str(name.with_suffix("")).casefold() for name in names}) == len(names):
        names = [name.with_suffix("") for name in names]
    return [name.as_posix() for name in names]


def write(out: Path, photo: Path, name: str, result: Result, with_scores: bool) -> None:
    """The files of one photo, and its line. Raises: OSError."""
    height, width = result.leaves.shape
    line = {"photo": str(photo), "name": name, "width": width, "height": height, "shares": result.shares}
    write_maps(out, name, np.asarray(result.photo), result.leaves, result.hierarchy)
    if with_scores:
        path = out / "scores" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, scores=result.scores.astype(np.float16), names=result.hierarchy.names)
    with open(out / "predictions.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="photos, folders, globs")
    parser.add_argument("--checkpoint", metavar="F", help="a .pt file, an experiment (default: the shipped model)")
    parser.add_argument("--out", type=Path, default=Path("outputs/predictions"), metavar="D", help="%(default)s")
    parser.add_argument("--scores", action="store_true", help="save the score map of every node too")
    parser.add_argument("--tta", choices=TTA, help="average over views: flip doubles the work, full is 17 times it")
    parser.add_argument("--tile", type=int, metavar="N", help="windows of N pixels; by default for large photos alone")
    parser.add_argument("--decode", choices=DECODE_RULES, help="another rule than the checkpoint's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--overwrite", action="store_true", help="write into --out although it holds files")
    arguments = parser.parse_args()
    out = Path(os.path.abspath(arguments.out))
    photos, lines = find_photos(arguments.paths), out / "predictions.jsonl"
    if out.is_dir() and any(out.iterdir()) and not arguments.overwrite:
        raise UserError(f"{out} is not empty; choose another --out, or replace what it holds with --overwrite")
    options = {"decode": arguments.decode, "tta": arguments.tta, "tile": arguments.tile}
    predictor = Predictor.load(arguments.checkpoint, arguments.device, **options)
    lines.unlink(missing_ok=True)
    faults = 0
    for photo, name in progress(list(zip(photos, output_names(photos), strict=True)), desc="predict", unit="photo"):
        try:
            with photo_named(str(photo)):
                result = predictor.predict_file(photo, keep_logits=arguments.scores)
        except NotFinite:  # so would the next one be
            raise
        except UserError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            faults += 1
        else:
            write(out, photo, name, result, arguments.scores)
    left_out = f", {faults} left out" if faults else ""
    print(f"{len(photos) - faults} of {len(photos)} photos{left_out}, by {predictor}: {arguments.out}")
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)
