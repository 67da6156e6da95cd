"""Scores a checkpoint on whole val photos and draws what it predicts.

python evaluate.py --cfg configs/quickstart.json                      # eval_checkpoint of the config, else best
python evaluate.py --cfg configs/quickstart.json --checkpoint last    # or checkpoint_10, a path
python evaluate.py --checkpoint F root_data_dir=data/pascal_part      # with the config in the checkpoint
python evaluate.py --cfg F --decode all --tta flip --no-pictures
torchrun --nproc_per_node=2 evaluate.py --cfg F

Rule, root_bias and tta are the checkpoint's own, unless a flag or an override names others.
"""

import argparse

from configs.config import DECODE_RULES, TTA, parse_overrides
from manage.distributed import session
from manage.evaluation_manager import EvaluationManager, EvaluationOptions, to_evaluate
from utils.cli import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="a JSON config; without it the checkpoint's, else the defaults")
    parser.add_argument("--checkpoint", metavar="C", help="last, checkpoint_<epoch> or a path (else best)")
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N val photos")
    parser.add_argument("--decode", choices=[*DECODE_RULES, "all"], help="another rule; all: score every rule")
    parser.add_argument("--tta", choices=TTA, help="average over views: flip doubles the work, full is 17 times it")
    parser.add_argument("--tile", type=int, metavar="N", help="windows of N pixels; by default for large photos alone")
    parser.add_argument("--no-pictures", action="store_true", help="scores only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for this run")
    arguments = parser.parse_intermixed_args()
    with session():
        config, checkpoint = to_evaluate(arguments.cfg, arguments.checkpoint, arguments.overrides)
        given = parse_overrides(arguments.overrides)
        options = EvaluationOptions(
            checkpoint=checkpoint,
            limit=arguments.limit,
            decode=given.get("decode") if arguments.decode in (None, "all") else arguments.decode,
            pictures=not arguments.no_pictures,
            all_rules=arguments.decode == "all",
            root_bias=config.root_bias if "root_bias" in given else None,
            tta=arguments.tta or given.get("tta"),
            tile=arguments.tile,
        )
        EvaluationManager(config, options).run()
    return 0


if __name__ == "__main__":
    run_main(main)
