"""Writes label maps of which few train photos keep their leaves; all others say no more than a level above does.

    python docs/figures/fewer_labels.py --cfg configs/pascal_part_cpu.json --out data/pascal_part/fewer
    python tools/experiment.py configs/experiments/fewer_labels.json --jobs 2

Every 8th train photo keeps its leaves. The second command trains on all photos with these maps (mixed) and on those
that keep their leaves alone, as many steps (few); configs/experiments/losses_cpu.json trains with all leaves.

Val photos keep theirs. train_few.txt lists the train photos that do.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.config import load_config
from manage.network import load_hierarchy
from utils.cli import progress, run_main
from utils.encoder import Encoder
from utils.encoding import check_encoded, load_encoding
from utils.errors import UserError
from utils.ids import read_ids, write_ids
from utils.images import read_labels, write_indexed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="config that says where the data is")
    parser.add_argument("--out", type=Path, required=True, metavar="D", help="a new folder")
    parser.add_argument("--every", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--level", type=int, default=2, metavar="L", help="of the other photos, from 2 (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.cfg, arguments.overrides)
    h, train, val = load_hierarchy(config), *(read_ids(config.ids_file(split)) for split in ("train", "val"))
    check_encoded(load_encoding(config.labels_dir, h), [*train, *val], config.ids_file("train"))
    if not 2 <= arguments.level <= h.num_levels or arguments.every < 1:
        raise UserError(f"--level goes from 2 to {h.num_levels} in this tree, --every from 1")
    masks = arguments.out / "masks"
    masks.mkdir(parents=True)
    few = train[:: arguments.every]
    lifted = set(train) - set(few)
    for sample_id in progress([*train, *val], desc="label maps"):
        labels = read_labels(config.labels_dir / f"{sample_id}.png")
        labels = h.level_of(labels, arguments.level - 1) if sample_id in lifted else labels
        write_indexed(masks / f"{sample_id}.png", labels, h.colours)
    Encoder(masks, config.images_dir, arguments.out / "labels", h, obey_exif=True).run()  # they are turned
    write_ids(few, arguments.out / "train_few.txt")
    print(f"{arguments.out}: {len(few)} of {len(train)} train photos keep their leaves")


if __name__ == "__main__":
    run_main(main)
