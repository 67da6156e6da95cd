"""Measures every stage against a plain baseline in the same run, and shows the bound that the machine sets.

    python tools/benchmark.py                                 # all stages, on drawn photos
    python tools/benchmark.py --data data/pascal_part         # on real ones
    python tools/benchmark.py --quick --only bce tree_min     # small sizes: does it run?
    python tools/benchmark.py --json out.json --profile traces
    python tools/benchmark.py --scaling                       # photos/s against crop, batch, nodes, workers, processes

The contestants of a stage take turns, so that a change of the machine's mood meets all of them. What is shown is the
median over the rounds of the ratio within a round, with the lowest and the highest. Times on their own are in the JSON.
The comparison with segmentation-models-pytorch needs requirements-benchmark.txt; without it that row is left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch

from manage.experiment import environment
from manage.session import session
from tools.benchmark_stages import STAGES, Contest, Setting, make_data, peak_memory_of
from utils.cli import progress, run_main


@dataclass
class Ratio:
    """Median and range of one ratio over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: list[float], under: list[float]) -> "Ratio":
        values = [a / b for a, b in zip(above, under, strict=True)]
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def main() -> None:
    arguments = read_arguments()
    if arguments.memory_of:
        print(peak_memory_of(arguments.memory_of, Setting.of(arguments)))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        setting = Setting.of(arguments, Path(folder))
        make_data(setting, arguments.data)
        if arguments.scaling:
            from tools.benchmark_scaling import scaling_tables  # starts trainings: only when asked for

            record = scaling_tables(setting)
        else:
            record = {"stages": run_stages(setting, arguments.only, arguments.rounds)}
            print(table(record["stages"]))
        if arguments.profile:
            write_profile(setting, arguments.profile)
    record = {"environment": environment(setting.device) | {"quick": arguments.quick}, **record}
    print("\n" + "\n".join(f"{key}: {value}" for key, value in record["environment"].items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: shows that it runs")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often the contestants of a stage take turns")
    parser.add_argument("--data", type=Path, metavar="D", help="a prepared data folder; without it photos are drawn")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch; default: its own choice")
    parser.add_argument("--json", type=Path, metavar="F", help="write everything, single times too")
    parser.add_argument("--profile", type=Path, metavar="D", help="write traces for chrome://tracing or TensorBoard")
    parser.add_argument("--scaling", action="store_true", help="the tables of docs/performance.md instead")
    parser.add_argument("--memory-of", choices=("plain", "ours"), help=argparse.SUPPRESS)  # one measures in a process
    return parser.parse_args()


# --- measuring ---
def run_stages(setting: Setting, only: list[str] | None, rounds: int | None) -> list[dict]:
    """Every stage's record, in order."""
    records = []
    for name in (bar := progress(only or STAGES, desc="stages")):
        bar.set_postfix_str(name)
        for contest in STAGES[name](setting):
            records.append({"name": name} | run_contest(contest, rounds or (2 if setting.quick else contest.rounds)))
    return records


def run_contest(contest: Contest, rounds: int) -> dict:
    """The record of one contest: ratios, targets, single times (or bytes, where a contestant returns a number)."""
    runners = {"plain": contest.plain, "ours": contest.ours, "bound": contest.bound}
    runners = {name: runner for name, runner in runners.items() if runner is not None}
    costs = take_turns(runners, rounds)
    contest.close()
    ratio = Ratio.of(costs["plain"], costs["ours"])
    of_bound = Ratio.of(costs["ours"], costs["bound"]) if "bound" in costs else None
    return {
        "stage": contest.title,
        "baseline": contest.baseline,
        "ratio": vars(ratio),
        "target": contest.target,
        "target_met": contest.target is None or ratio.median >= contest.target,
        "bound": contest.bound_title,
        "of_bound": vars(of_bound) if of_bound else None,
        "bound_target": contest.bound_target,
        "bound_met": contest.bound_target is None or of_bound.median <= contest.bound_target,
        "note": contest.note,
        "unit": contest.unit,
        "costs": costs,
    }


def take_turns(runners: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """The cost of each runner in each round: the seconds it took, or the number that it returned itself.

    One round before the first is not counted. The order turns from round to round, since the one that comes second
    finds warmer caches.
    """
    costs: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for number in range(-1, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            cost = cost_of(runners[name])
            if number >= 0:
                costs[name].append(cost)
    return costs


def cost_of(runner: Callable[[], float | None]) -> float:
    """A GPU runs beside the program, so the clock starts when it is idle and stops when it is idle again."""
    synchronise()
    start = time.perf_counter()
    own = runner()
    synchronise()
    return time.perf_counter() - start if own is None else own


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- showing ---
def table(records: list[dict]) -> str:
    """Markdown: how many times better than the plain baseline, and how far from the bound."""
    lines = [
        "| stage | plain baseline | times better than it | target | bound | cost over the bound | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        of_bound = record["of_bound"]
        cells = [
            record["stage"] + (f" ({record['note']})" if record["note"] else ""),
            record["baseline"],
            str(Ratio(**record["ratio"])),
            verdict(record["target"], record["target_met"], "at least"),
            record["bound"] or "-",
            str(Ratio(**of_bound)) if of_bound else "-",
            verdict(record["bound_target"], record["bound_met"], "at most"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(target: float | None, is_met: bool, how: str) -> str:
    return "-" if target is None else f"{how} {target:g}: {'met' if is_met else '**missed**'}"


def write_profile(setting: Setting, folder: Path) -> None:
    """A trace of two training steps; chrome://tracing, ui.perfetto.dev and TensorBoard open it."""
    from tools.benchmark_stages import training

    manager, group = training(setting, setting.crops[-1])
    manager.train_step(group)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(profile_memory=True) as profiler:
        for _ in range(2):
            manager.train_step(group)
        synchronise()
    path = folder / "train_step.pt.trace.json"
    profiler.export_chrome_trace(str(path))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
    print(f"wrote {path}")


if __name__ == "__main__":
    with session():
        run_main(main)
