"""Checks the masks of a data set against the tree and encodes them for training.

    python tools/dataset_hie_enc.py
    python tools/dataset_hie_enc.py --cfg configs/quickstart.json
    python tools/dataset_hie_enc.py --gtdatadir data/mine/gt_masks --save_dir data/mine/gt_masks_hie

Reads <id>.png and <id>.npy; writes <id>.png (one byte a pixel, in the tree's colours) and encoding.json. A second
run does only what is missing or changed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config import load_config
from utils.cli import run_main
from utils.encoding import check_classes, encode_folder
from utils.errors import UserError

MASKS = "gt_masks"
CLASSES = "classes.txt"


def read_arguments() -> argparse.Namespace:
    """The command line, with the places that it leaves open taken from the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="config that says where the data is (default: that of config.py)")
    parser.add_argument("--gtdatadir", type=Path, metavar="D", help=f"masks (default: {MASKS} in the data folder)")
    parser.add_argument("--save_dir", type=Path, metavar="D", help="encoded masks (default: gt_dir of the config)")
    parser.add_argument("--imgdir", type=Path, metavar="D", help="photos (default: img_dir of the config)")
    parser.add_argument("--hierarchy", type=Path, metavar="F", help="tree file (default: that of the config)")
    parser.add_argument(
        "--classes", type=Path, metavar="F", help=f"'id: name' a line (default: {CLASSES} by the masks)"
    )
    parser.add_argument(
        "--assume-order", action="store_true", help="there is no list of classes; the labels are the tree's ids"
    )
    args = parser.parse_args()
    config = load_config(args.cfg)
    data_dir = args.gtdatadir.resolve().parent if args.gtdatadir else config.data_dir
    args.gtdatadir = args.gtdatadir or data_dir / MASKS
    args.save_dir = args.save_dir or data_dir / config.gt_dir
    args.imgdir = args.imgdir or data_dir / config.img_dir
    args.hierarchy = args.hierarchy or config.hierarchy_file
    return args


def find_classes(args: argparse.Namespace) -> Path | None:
    """The list that says what the labels mean, or None where the user vouches for them.

    Raises: UserError where there is neither.
    """
    places = [args.classes] if args.classes else [args.gtdatadir / CLASSES, args.gtdatadir.parent / CLASSES]
    found = next((place for place in places if place.is_file()), None)
    if found is None and (args.classes or not args.assume_order):
        raise UserError(
            f"nothing says what the labels of {args.gtdatadir} mean: {places[-1]} does not exist. Write one line "
            "'id: name' for each label; or, if you are sure that they are the tree's ids, give --assume-order"
        )
    return found


def main() -> None:
    """Checks, encodes and says what there is."""
    args = read_arguments()
    # Imported here and not above: worker processes import this file, and would wait seconds for torch.
    from utils.hierarchy import Hierarchy
    from utils.pascal_part import read_classes

    if args.save_dir.resolve() in (args.gtdatadir.resolve(), args.imgdir.resolve()):
        raise UserError(f"--save_dir {args.save_dir} is where the masks or photos are; choose another folder")
    hierarchy = Hierarchy.load(args.hierarchy)
    if not args.gtdatadir.is_dir():
        raise UserError(
            f"the folder of masks {args.gtdatadir} does not exist. Give it with --gtdatadir or --cfg, or draw "
            "sample data: python tools/make_sample_data.py"
        )
    if classes := find_classes(args):
        check_classes(read_classes(classes, hierarchy.names), hierarchy, classes)
    encoding, changed = encode_folder(args.gtdatadir, args.imgdir, args.save_dir, hierarchy)

    total = max(sum(encoding.labelled) + encoding.ignored, 1)
    print(f"{'node':<24}{'% of pixels':>12}{'photos':>9}")
    for name, pixels, photos in zip(hierarchy.names, encoding.pixels, encoding.photos, strict=True):
        print(f"{name:<24}{100 * pixels / total:>12.2f}{photos:>9}")
    print(f"{args.save_dir}: {len(encoding.ids)} masks, {changed} of them new or changed")


if __name__ == "__main__":
    run_main(main)
