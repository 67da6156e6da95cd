"""Scores a checkpoint on whole val photos and draws what it predicts.

python evaluate.py --cfg configs/quickstart.json                      # eval_checkpoint of the config
python evaluate.py --cfg configs/quickstart.json --checkpoint best    # or last, checkpoint_10, a path
python evaluate.py --cfg F --checkpoint best --decode all --no-pictures
torchrun --nproc_per_node=2 evaluate.py --cfg F --checkpoint best
"""

import argparse

from configs.config import DECODE_RULES, load_config
from manage import distributed
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from utils.cli import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="a JSON config; without it the defaults of configs/config.py")
    parser.add_argument("--checkpoint", metavar="C", help="best, last, checkpoint_<epoch> or a path")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N val photos")
    parser.add_argument("--decode", choices=[*DECODE_RULES, "all"], help="another rule; all: score every rule")
    parser.add_argument("--no-pictures", action="store_true", help="scores only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for this run")
    arguments = parser.parse_intermixed_args()
    with distributed.session():
        config = load_config(arguments.cfg, arguments.overrides)
        options = EvaluationOptions(arguments.checkpoint, arguments.limit, arguments.decode, not arguments.no_pictures)
        EvaluationManager(config, options).run()
    return 0


if __name__ == "__main__":
    run_main(main)
