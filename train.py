"""Trains a network.

python train.py --cfg configs/quickstart.json                    # an experiment
python train.py --cfg configs/quickstart.json batch_size=4       # with overrides for this run
python train.py --cfg configs/quickstart.json --resume           # go on where it stopped
python train.py --cfg configs/quickstart.json --resume auto      # go on, or start (for schedulers)
torchrun --nproc_per_node=2 train.py --cfg configs/quickstart.json
tensorboard --logdir tensorboard
"""

import argparse

from configs.config import load_config
from manage import distributed
from manage.train_manager import TrainManager
from utils.cli import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="a JSON config; without it the defaults of configs/config.py")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from the newest checkpoint; auto: or start; PATH: from that one, under a new exp_name",
    )
    parser.add_argument("--overwrite", action="store_true", help="move an experiment of that name aside and start anew")
    parser.add_argument("--take-over", action="store_true", help="take the lock of another host, which must be gone")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for this run")
    arguments = parser.parse_intermixed_args()
    if arguments.resume is not None and arguments.overwrite:
        parser.error("--resume goes on with an experiment, --overwrite starts anew: give one of them")
    if arguments.resume and "=" in arguments.resume:  # --resume key=value
        arguments.overrides.append(arguments.resume)
        arguments.resume = ""
    with distributed.session():
        config = load_config(arguments.cfg, arguments.overrides)
        distributed.start(distributed.choose_device(config.device), config.timeout_minutes)
        return TrainManager(config).run(arguments.resume, arguments.overwrite, arguments.take_over)


if __name__ == "__main__":
    run_main(main)
