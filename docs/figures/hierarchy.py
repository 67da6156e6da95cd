"""Makes the tables and the picture of docs/does_the_hierarchy_help.md from the records in docs/evidence.

    python docs/figures/hierarchy.py
    python docs/figures/hierarchy.py --take experiments    # first copies there the records of runs that are finished

Compares the runs that configs/experiments/losses_cpu.json and fewer_labels.json list, and writes
docs/figures/hierarchy.png, hierarchy_runs.csv (every run by every rule), hierarchy_differences.csv (every comparison),
and the tables of the page between its marks. Needs matplotlib (requirements-charts.txt).

The record of a run is what tools/compare.py reads: its config, how it was started, its scores, and the counts of each
val photo, from which the intervals are drawn.
"""

import argparse
import csv
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from differences import LEGEND, panel
from matplotlib.figure import Figure

from manage.comparison import (
    RESAMPLES,
    SEVERITY,
    Difference,
    Group,
    allow_for_many,
    bootstrap,
    check_comparable,
    difference,
    load_experiment,
    mean_and_spread,
)
from manage.tables import Table, to_markdown
from utils.cli import progress, run_main
from utils.files import read_json, write_whole

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
RECORD = ("configs", "environment.json", "evaluation/last/scores.json", "evaluation/last/photos.npz")
PAGE = ROOT / "docs" / "does_the_hierarchy_help.md"
BASELINES = ("bce", "ce")  # the loss over all nodes that asks for no consistency, and the one that knows no tree
LEVELS = {"mIoU1": "parts", "mIoU2": "halves", "mIoU3": "body"}
SCORES = (*LEVELS, SEVERITY)  # of which differences are taken
COLUMNS = {
    **{level: level for level in LEVELS},
    "pixel_accuracy": "accuracy",
    SEVERITY: "severity",
    "violation_rate": "violations",
    "ECE_leaf": "ECE leaf",
    "ECE_body": "ECE body",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="D", help="a folder of experiments")
    folder = parser.parse_args().take
    for stem in ("losses_cpu", "fewer_labels") if folder else ():
        for run in (run for runs in read_entries(stem).values() for run in runs):
            take(folder / run, EVIDENCE / run)
    losses, fewer = read_groups("losses_cpu"), read_groups("fewer_labels")
    differences = compare_pairs(losses | fewer, all_pairs(losses, fewer))
    write_csv("hierarchy_runs.csv", run_rows([*losses.values(), *fewer.values()]))
    write_csv("hierarchy_differences.csv", difference_rows(differences))
    text = PAGE.read_text(encoding="utf-8")
    if len(losses) == len(read_entries("losses_cpu")):  # until then those of an earlier round stand
        draw(differences, [*losses]).savefig(Path(__file__).with_suffix(".png"), dpi=110)
        text = replaced(text, "losses", loss_table(losses))
    write_whole(replaced(text, "fewer labels", fewer_table(losses, fewer, differences)), PAGE)
    print(
        f"{len(differences)} comparisons of {len(losses) + len(fewer)} groups; wrote {PAGE} and {Path(__file__).stem}.*"
    )


def replaced(text: str, mark: str, table: Table) -> str:
    """The page with another table between two marks."""
    begin, end = f"<!-- {mark}: made by docs/figures/hierarchy.py -->\n", f"\n<!-- end of {mark} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{to_markdown(table).strip()}\n{end}{rest.split(end)[1]}"


def read_entries(stem: str) -> dict[str, list[str]]:
    """The names of an entry's experiments, one a seed."""
    content = read_json(ROOT / "configs" / "experiments" / f"{stem}.json")
    runs = {entry["name"]: entry.get("seeds", content["seeds"]) for entry in content["runs"]}
    return {name: [f"{stem}_{name}_seed{seed}" for seed in seeds] for name, seeds in runs.items()}


def is_finished(run: Path) -> bool:
    return all((run / part).exists() for part in RECORD)


def take(run: Path, kept: Path) -> None:
    """Copies a finished run's record, unless there is one."""
    if is_finished(run) and not kept.exists():
        for part in RECORD:
            (kept / part).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (run / part).is_dir() else shutil.copy)(run / part, kept / part)


def read_groups(stem: str) -> dict[str, Group]:
    """The finished seeds of every entry that has two; a single one says little."""
    groups = {}
    for name, runs in progress(read_entries(stem).items(), desc=stem, leave=False):
        done = [load_experiment(EVIDENCE / run, "last") for run in runs if is_finished(EVIDENCE / run)]
        if len(done) < len(runs):
            print(f"{stem}, {name}: {len(done)} of {len(runs)} runs are finished")
        if len(done) > 1:
            groups[name] = Group(name, done)
    return groups


def all_pairs(losses: dict[str, Group], fewer: dict[str, Group]) -> list[tuple[str, str]]:
    """What is compared with what: every loss with both baselines; of few labels, mixed with few and with all."""
    flat, tree_free = BASELINES
    found = [(flat, name) for name in losses if name != flat]
    found += [(tree_free, name) for name in losses if name not in BASELINES]
    found += [(first, f"{name}_mixed") for name in mixed(fewer) for first in (f"{name}_few", name)]
    return [pair for pair in found if {*losses, *fewer}.issuperset(pair)]


def mixed(fewer: dict[str, Group]) -> list[str]:
    """The losses that were trained with mixed labels."""
    return [name.removesuffix("_mixed") for name in fewer if name.endswith("_mixed")]


def compare_pairs(groups: dict[str, Group], pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """The differences of all pairs in all scores, with the allowance for their number."""
    check_comparable([e for group in groups.values() for e in group.experiments])
    samples = {name: bootstrap(group.experiments, RESAMPLES) for name, group in progress(groups.items(), desc="draw")}
    found = [
        (difference(groups[first], groups[second], score), samples[second][:, i] - samples[first][:, i])
        for first, second in pairs
        for i, score in enumerate(SCORES)
    ]
    return allow_for_many(found)


# ---- the picture -------------------------------------------------------------------------------------------------


def draw(differences: Sequence[Difference], names: Sequence[str]) -> Figure:
    """A row a level, a column a baseline."""
    figure = Figure(figsize=(11, 1.2 + len(LEVELS) * (0.25 * len(names) + 0.35)), layout="constrained")
    panels = figure.subplots(len(LEVELS), len(BASELINES), sharex="col", sharey=True)
    for row, level in zip(panels, LEVELS, strict=True):
        for axes, baseline in zip(row, BASELINES, strict=True):
            of_level = [d for d in differences if d.score == level and {d.first, d.second} <= {*names}]
            shown = [d if d.first == baseline else mirrored(d) for d in of_level if baseline in (d.first, d.second)]
            title = f"{level} ({LEVELS[level]}), difference from {baseline}"
            panel(axes, [vars(d) | {"verdict": d.verdict} for d in shown], names, title)
    figure.supxlabel(f"points of mIoU; {LEGEND}", fontsize="medium")
    return figure


def mirrored(d: Difference) -> Difference:
    by_seed = {seed: -value for seed, value in d.by_seed.items()}
    return Difference(d.second, d.first, d.score, -d.value, by_seed, d.photos, -d.high, -d.low, d.p)


# ---- tables ------------------------------------------------------------------------------------------------------


def loss_table(losses: dict[str, Group]) -> Table:
    rows = [["loss", "seeds", "rate", "decoded by", *COLUMNS.values()]]
    for name, group in losses.items():
        config = group.experiments[0].config
        own = [name, str(len(group.experiments)), str(config["lr"]), config["decode"]]
        rows.append([*own, *(mean(group, score) for score in COLUMNS)])
    return rows


def fewer_table(losses: dict[str, Group], fewer: dict[str, Group], differences: Sequence[Difference]) -> Table:
    rows = [["loss", "score", "few", "mixed", "all", "mixed - few", "mixed - all"]]
    for name in mixed(fewer):
        groups = [fewer.get(f"{name}_few"), fewer[f"{name}_mixed"], losses.get(name)]
        for score in SCORES:
            found = {d.first: d for d in differences if (d.second, d.score) == (f"{name}_mixed", score)}
            means = [mean(group, score) if group else "-" for group in groups]
            gaps = [said(found[key]) if key in found else "-" for key in (f"{name}_few", name)]
            rows.append([name, COLUMNS[score], *means, *gaps])
    return rows


def mean(group: Group, score: str) -> str:
    """In percent; the severity a height."""
    percent, digits = (1, 2) if score == SEVERITY else (100, 1)
    found = [f"{percent * v:.{digits}f}" for v in mean_and_spread([*group.values(score).values()]) if v == v]
    return " ± ".join(found) or "-"


def said(d: Difference) -> str:
    """A difference and its interval, bold where it is clear."""
    value, low, high = (f"{v:+.3f}" if d.score == SEVERITY else f"{100 * v:+.1f}" for v in (d.value, d.low, d.high))
    text = f"{value} ({low} to {high})"
    return f"**{text}**" if d.verdict in ("better", "worse") else text


def run_rows(groups: Sequence[Group]) -> Table:
    rows = [["run", "seed", "rate", "own rule", "commit", "rule", *COLUMNS]]
    for e in (e for group in groups for e in group.experiments):
        about = [e.name, e.config["seed"], e.config["lr"], e.config["decode"], e.said("commit")]
        rows += [
            [*about, rule, *(rounded(scores.get(key)) for key in COLUMNS)] for rule, scores in e.record["rules"].items()
        ]
    return rows


def difference_rows(differences: Sequence[Difference]) -> Table:
    rows = [["first", "second", "score", "second - first", "low", "high", "p (Holm)", "verdict", "each seed"]]
    for d in differences:
        seeds = " ".join(map(rounded, d.by_seed.values()))
        rows.append([d.first, d.second, d.score, *map(rounded, (d.value, d.low, d.high, d.p)), d.verdict, seeds])
    return rows


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def write_csv(name: str, rows: Table) -> None:
    with open(Path(__file__).with_name(name), "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    run_main(main)
