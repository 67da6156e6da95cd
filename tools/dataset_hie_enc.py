"""Checks the masks of a data set against the tree and its photos, and encodes them for training.

    python tools/dataset_hie_enc.py --cfg configs/quickstart.json
    python tools/dataset_hie_enc.py --gtdatadir data/mine/gt_masks --split 0.1
    python tools/dataset_hie_enc.py --cfg configs/city.json --gtdatadir data/cityscapes/gtFine \\
        --classes configs/hierarchies/cityscapes_classes.txt --split folders

Reads grey, indexed and colour-coded PNGs and .npy, in folders below folders, too; writes <id>.png (one byte a pixel,
in the tree's colours) and encoding.json. A second run does only what is missing or changed.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config import Config, load_config
from utils.cli import run_main
from utils.encoder import Encoder
from utils.encoding import load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import draw_split, read_ids, write_ids
from utils.masks import read_classes

MASKS, CLASSES = "gt_masks", "classes.txt"


def read_arguments() -> tuple[argparse.Namespace, Config]:
    """The command line, with the places that it leaves open taken from the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="config keys, such as hierarchy=F or obey_exif=true")
    add("--cfg", metavar="F", help="config that says where the data is (default: that of config.py)")
    add("--gtdatadir", type=Path, metavar="D", help=f"masks (default: {MASKS} in the data folder)")
    add("--save_dir", type=Path, metavar="D", help="encoded masks (default: gt_dir of the config)")
    add("--classes", type=Path, metavar="F", help=f"what the values mean (default: {CLASSES} by the masks)")
    add("--assume-order", action="store_true", help="there is no list of classes; the values are the tree's ids")
    add("--skip-faulty", action="store_true", help="leave out what cannot be encoded, even if a list names it")
    add("--split", metavar="S", help="write id lists where there are none: a share of val (0.1), or 'folders'")
    add("--seed", type=int, default=0, help="of a drawn split (default 0)")
    args = parser.parse_intermixed_args()
    if args.split not in (None, "folders") and not re.fullmatch(r"0?\.\d*[1-9]\d*", args.split):
        parser.error(f"--split {args.split}: expected a share between 0 and 1, such as 0.1, or 'folders'")
    config = load_config(args.cfg, args.overrides)
    if args.gtdatadir and not args.cfg:
        config.root_data_dir = str(args.gtdatadir.resolve().parent)
    args.gtdatadir = args.gtdatadir or config.data_dir / MASKS
    args.save_dir = args.save_dir or config.labels_dir
    return args, config


def find_classes(args: argparse.Namespace) -> Path | None:
    """The list that says what the values mean, or None where the user vouches for them.

    Raises: UserError where there is neither.
    """
    places = [args.classes] if args.classes else [args.gtdatadir / CLASSES, args.gtdatadir.parent / CLASSES]
    found = next((place for place in places if place.is_file()), None)
    if found is None and (args.classes or not args.assume_order):
        raise UserError(
            f"nothing says what the values in {args.gtdatadir} mean: {places[-1]} does not exist. Write one line "
            "'name: value' for each class; or, if you are sure that they are the tree's ids, give --assume-order"
        )
    return found


def write_lists(config: Config, split: str, seed: int, sources: dict[str, str]) -> None:
    """The lists of a drawn split, or of the folders train/ and val/ that the masks lie in."""
    if split == "folders":
        parts = {part: [i for i, path in sources.items() if path.split("/")[0] == part] for part in ("train", "val")}
        if not all(parts.values()):
            raise UserError("--split folders: the masks do not lie in folders train and val; give a share, such as 0.1")
    else:
        parts = draw_split(sources, float(split), seed)
    for part, ids in parts.items():
        path = config.ids_file(part)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_ids(ids, path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}); set {part}_sample_ids_file elsewhere") from error
        print(f"{path}: {len(ids)} ids")


def main() -> None:
    """Checks, encodes and says what there is."""
    args, config = read_arguments()
    if not args.gtdatadir.is_dir():
        raise UserError(f"the folder of masks {args.gtdatadir} does not exist; name it by --gtdatadir or --cfg")
    save_dir = args.save_dir.resolve()
    if {args.gtdatadir.resolve(), config.images_dir.resolve()} & {save_dir, *save_dir.parents}:
        raise UserError(f"--save_dir {args.save_dir} is where the masks or photos are; choose another folder")
    hierarchy = Hierarchy.load(config.hierarchy_file)
    path = find_classes(args)
    classes = read_classes(path, hierarchy.names) if path else None
    lists = [path for path in (config.ids_file("train"), config.ids_file("val")) if path.is_file()]
    ids = {sample_id for path in lists for sample_id in read_ids(path)} if lists else None
    places = args.gtdatadir, config.images_dir, args.save_dir
    changed = Encoder(*places, hierarchy, classes, config.obey_exif, ids, args.skip_faulty).run()
    encoding = load_encoding(args.save_dir, hierarchy)

    print(f"{'node':<24}{'% of pixels':>12}{'photos':>9}")
    for name, pixels, photos in zip(hierarchy.names, encoding.pixels, encoding.photos, strict=True):
        print(f"{name:<24}{100 * pixels / max(encoding.total, 1):>12.2f}{photos:>9}")
    for sample_id, fault in encoding.skipped.items():
        print(f"left out: {sample_id}: {fault}")
    print(f"{args.save_dir}: {len(encoding.files)} masks, {changed} of them new or changed")
    if args.split and lists:
        print(f"no split is drawn: {lists[0]} is there already")
    elif args.split:
        write_lists(config, args.split, args.seed, {i: record["source"] for i, record in encoding.files.items()})


if __name__ == "__main__":
    run_main(main)
