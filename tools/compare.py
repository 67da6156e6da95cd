"""Compares evaluated experiments: configs, scores, differences with their uncertainty, curves.

    python tools/compare.py hseg_bce_100 hseg_tree_min_100
    python tools/compare.py experiments/bce_seed* experiments/tree_min_seed* --out docs/losses
    python tools/compare.py a b --evaluation last --decode leaf

Experiments that differ only in their seed, trained by equally many processes, form a group; the first is the
baseline. Writes comparison.md (ready for a README), comparison.html (one file, pictures inside), comparison.json and
a picture of each curve. The evaluations are those of evaluate.py.
"""

import argparse
import base64
import html
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config import DECODE_RULES
from manage.charts import Interval, interval_chart, line_chart
from manage.comparison import (
    CONFIDENCE,
    RESAMPLES,
    Comparison,
    Group,
    compare,
    load_experiment,
    mean_and_spread,
    points,
)
from utils.cli import progress, run_main
from utils.errors import UserError
from utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", metavar="EXP", help="an experiment's folder, or name")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/comparison"), metavar="D", help="default: %(default)s"
    )
    parser.add_argument("--evaluation", default="best", metavar="E", help="best, last, ...: which evaluation")
    parser.add_argument("--decode", choices=DECODE_RULES, help="another rule; default: as each was evaluated")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N", help="of the photos (%(default)s)")
    arguments = parser.parse_args()
    if arguments.resamples < 100:
        raise UserError(f"--resamples {arguments.resamples}: expected at least 100, for an interval")
    bar = progress(arguments.experiments, desc="read", leave=False)
    experiments = [load_experiment(name, arguments.evaluation, arguments.decode) for name in bar]
    comparison = compare(experiments, arguments.resamples)
    for line in [*_score_lines(comparison), *verdicts(comparison)]:
        print(line)
    for path in write_report(comparison, arguments.out, "comparison", "Comparison", with_page=True):
        print(f"wrote {path}")


def write_report(
    comparison: Comparison, out: Path, stem: str, title: str, notes: Sequence[str] = (), with_page: bool = False
) -> list[Path]:
    """Writes the pictures, <stem>.md and, with a page, <stem>.html and <stem>.json; returns their paths.

    Raises: UserError when `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        differences = draw_differences(comparison, out, stem)
        pictures = draw_curves(comparison, out, stem)
        blocks = report(comparison, title, notes, differences, pictures)
        written = [
            *(picture.path for picture in (*differences, *pictures)),
            _write(out / f"{stem}.md", to_markdown(blocks)),
        ]
        if with_page:
            written.append(_write(out / f"{stem}.html", to_html(blocks, title)))
            write_json(to_record(comparison), out / f"{stem}.json")
            written.append(out / f"{stem}.json")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return written


def _write(path: Path, text: str) -> Path:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path


# ---- what a report says, in blocks that become Markdown or HTML --------------------------------------------------


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Items:
    """Plain sentences, one a line."""

    sentences: list[str]


@dataclass(frozen=True)
class Table:
    """First column names, the others numbers."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    title: str
    path: Path


Block = Heading | Items | Table | Picture


def report(
    comparison: Comparison,
    title: str,
    notes: Sequence[str],
    differences: Sequence[Picture],
    pictures: Sequence[Picture],
) -> list[Block]:
    """The whole report."""
    photos = len(comparison.experiments[0].ids)
    seeds = "mean ± standard deviation over seeds" if any(len(g.seeds) > 1 for g in comparison.groups) else "one seed"
    about = f"Scores in percent on {photos:,} whole val photos, {seeds}. mIoU leaves background out."
    blocks: list[Block] = [Heading(title), Items([*notes, about]), score_table(comparison)]
    if comparison.differences:
        method = (
            f"Differences in points; {CONFIDENCE:.0%} interval from a paired bootstrap over the val photos. Better or "
            "worse is said where the interval leaves out 0 and all seeds agree in sign."
        )
        blocks += [Heading("Differences"), Items(verdicts(comparison)), *differences]
        blocks += [difference_table(comparison), Items([method])]
    for level in comparison.hierarchy.level_names:
        blocks += [Heading(f"IoU per class: {level}"), class_table(comparison, level)]
    if (rules := rule_table(comparison)) is not None:
        blocks += [Heading("Decoding rules (mIoU1)"), rules]
    if pictures:
        blocks += [Heading("Curves"), *pictures]
    if comparison.differing:
        blocks += [Heading("What differs in the configs"), config_table(comparison)]
    return [*blocks, Heading("Runs"), run_table(comparison)]


def score_table(comparison: Comparison) -> Table:
    names = list(comparison.experiments[0].scores)
    titles = [name.replace("_with_background", " with bg").replace("_", " ") for name in names]
    rows = [
        [group.label, str(len(group.seeds)), *(_mean(group.values(n)) for n in names)] for group in comparison.groups
    ]
    return Table(["", "seeds", *titles], rows)


def difference_table(comparison: Comparison) -> Table:
    rows = []
    for d in comparison.differences:
        per_seed = ", ".join(points(value) for value in d.by_seed.values()) or "-"
        spread = mean_and_spread(list(d.by_seed.values()))[1]
        between = f"{points(d.low)} to {points(d.high)}"
        numbers = [points(d.value), between, per_seed, _percent(spread)]
        rows.append([d.second, d.first, d.score, *numbers, d.verdict])
    header = ["", "against", "score", "difference", f"{CONFIDENCE:.0%} over photos", "each seed", "std over seeds"]
    return Table([*header, "verdict"], rows)


def class_table(comparison: Comparison, level_name: str) -> Table:
    index = comparison.hierarchy.level_names.index(level_name)
    rows = []
    for name in comparison.experiments[0].result["levels"][index]["IoU"]:
        values = [[e.result["levels"][index]["IoU"][name] for e in group.experiments] for group in comparison.groups]
        rows.append([name, *map(_mean, values)])
    return Table(["class", *(group.label for group in comparison.groups)], rows)


def rule_table(comparison: Comparison) -> Table | None:
    """mIoU1 of each group under each decoding rule that all were scored with; None if that is one rule."""
    shared = [r for r in DECODE_RULES if all(r in e.record["rules"] for e in comparison.experiments)]
    if len(shared) < 2:
        return None
    rows = []
    for group in comparison.groups:
        values = [[e.record["rules"][rule]["mIoU1"] for e in group.experiments] for rule in shared]
        rows.append([group.label, *map(_mean, values), group.experiments[0].rule])
    return Table(["", *shared, "decoded by"], rows)


def config_table(comparison: Comparison) -> Table:
    rows = [[key, *(json.dumps(value) for value in values)] for key, values in comparison.differing.items()]
    return Table(["key", *(group.label for group in comparison.groups)], rows)


def run_table(comparison: Comparison) -> Table:
    rows = []
    for e in comparison.experiments:
        seconds = e.curves[-1].get("train_seconds") if e.curves else None
        minutes = "-" if seconds is None else f"{seconds / 60:.1f}"
        epoch = f"{e.record['epoch']} of {e.config['n_epochs']}"
        rows.append([e.name, str(e.seed), epoch, minutes, e.said("commit"), e.said("hardware")])
    return Table(["run", "seed", "epoch", "train minutes", "commit", "hardware"], rows)


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each level and each group against the first, the baseline."""
    baseline = comparison.groups[0].label
    return [difference.sentence for difference in comparison.differences if difference.first == baseline]


def to_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON types; scores in [0, 1]."""
    differences = [
        {
            "first": d.first,
            "second": d.second,
            "score": d.score,
            "difference": _finite(d.value),
            "interval_over_photos": [_finite(d.low), _finite(d.high)],
            "by_seed": {str(seed): value for seed, value in d.by_seed.items()},
            "verdict": d.verdict,
            "sentence": d.sentence,
        }
        for d in comparison.differences
    ]
    groups = [_group_record(group) for group in comparison.groups]
    return {"photos": len(comparison.experiments[0].ids), "groups": groups, "differences": differences}


def _group_record(group: Group) -> dict[str, Any]:
    scores = {}
    for name in group.experiments[0].scores:
        mean, spread = mean_and_spread(group.values(name))
        scores[name] = {"mean": mean, "std": spread}
    return {"name": group.label, "runs": [e.name for e in group.experiments], "seeds": group.seeds, "scores": scores}


def _score_lines(comparison: Comparison) -> list[str]:
    """The score table for a terminal, in columns."""
    table = score_table(comparison)
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def _mean(values: Sequence[float | None]) -> str:
    """`41.20 ± 0.31`, in percent."""
    mean, spread = mean_and_spread(values)
    return _percent(mean) if spread is None else f"{_percent(mean)} ± {_percent(spread)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- pictures ----------------------------------------------------------------------------------------------------


def draw_differences(comparison: Comparison, out: Path, stem: str) -> list[Picture]:
    """Each group against the first at each level: difference, interval over photos, a ring for each seed.

    One seed leaves the seed's part unknown, so such a difference stays grey.
    """
    baseline, rows = comparison.groups[0].label, {}
    for d in comparison.differences:
        if d.first == baseline and all(map(math.isfinite, (d.value, d.low, d.high))):
            numbers = [100 * value for value in (d.value, d.low, d.high)]
            seeds = [100 * value for value in d.by_seed.values()]
            row = Interval(d.second, *numbers, seeds, d.verdict in ("better", "worse") and len(seeds) > 1)
            rows.setdefault(f"{d.score} ({d.level_name})", []).append(row)
    if not rows:
        return []
    path = out / f"{stem}_differences.png"
    unit = f"points; bar: {CONFIDENCE:.0%} over photos; ring: one seed; coloured: bar clear of 0, several seeds agree"
    interval_chart(rows, path, f"difference from {baseline}", unit)
    return [Picture("differences", path)]


def draw_curves(comparison: Comparison, out: Path, stem: str) -> list[Picture]:
    """loss_train and the mIoU of each level: mean over seeds, and their range as a band."""
    pictures = []
    losses_differ = "criterion" in comparison.differing
    levels = range(1, comparison.hierarchy.num_levels + 1)
    for name, factor in [("loss_train", 1), *((f"mIoU{level}", 100) for level in levels)]:
        series, bands = {}, {}
        for group in comparison.groups:
            band = curve(group, name, factor)
            if band:
                series[group.label] = [(epoch, mean) for epoch, mean, _, _ in band]
                bands[group.label] = [(epoch, low, high) for epoch, _, low, high in band]
        if not series:
            continue
        path = out / f"{stem}_{name}.png"
        unit = " (%), val" if factor == 100 else ", each of its own criterion" if losses_differ else ""
        shade = "; shaded: range over seeds" if any(len(g.seeds) > 1 for g in comparison.groups) else ""
        line_chart(series, path, name, "epoch", f"{name}{unit}{shade}", bands)
        pictures.append(Picture(name, path))
    return pictures


def curve(group: Group, name: str, factor: float) -> list[tuple[int, float, float, float]]:
    """(epoch, mean, lowest, highest) over the seeds, at the epochs that all of them have."""
    runs = []
    for experiment in group.experiments:
        values = {record["epoch"]: record.get(name) for record in experiment.curves}
        runs.append({epoch: value for epoch, value in values.items() if value is not None})
    epochs = sorted(set.intersection(*map(set, runs)))
    columns = [[factor * run[epoch] for run in runs] for epoch in epochs]
    return [(epoch, sum(c) / len(c), min(c), max(c)) for epoch, c in zip(epochs, columns, strict=True)]


# ---- Markdown and HTML -------------------------------------------------------------------------------------------


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown(block, is_first=number == 0) for number, block in enumerate(blocks)) + "\n"


def _markdown(block: Block, is_first: bool) -> str:
    match block:
        case Heading(text):
            return f"{'#' if is_first else '##'} {text}"
        case Items(sentences):
            return "\n".join(f"- {sentence}" for sentence in sentences) if len(sentences) > 1 else sentences[0]
        case Picture(title, path):
            return f"![{title}]({path.name})"
        case Table(header, rows):
            rule = ["---", *["---:"] * (len(header) - 1)]
            lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1320px; padding: 0 1rem; }
h1, h2 { font-weight: 600; line-height: 1.2; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }
th { color: #555; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f6f8fa; } .better { color: #00704f; } .worse { color: #b34700; }
p { max-width: 60rem; } img { max-width: 100%; height: auto; } li { margin: .2rem 0; }
"""


def to_html(blocks: Sequence[Block], title: str) -> str:
    """One file that needs nothing else: pictures are inside."""
    body = "\n".join(_html(block, is_first=number == 0) for number, block in enumerate(blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, is_first: bool) -> str:
    match block:
        case Heading(text):
            tag = "h1" if is_first else "h2"
            return f"<{tag}>{html.escape(text)}</{tag}>"
        case Items(sentences):
            if len(sentences) == 1:
                return f"<p>{html.escape(sentences[0])}</p>"
            return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"
        case Picture(name, path):
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>'
        case Table(header, rows):
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
            lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = f' class="{text}"' if text in ("better", "worse") else ""
    return f"<td{kind}>{html.escape(text)}</td>"


if __name__ == "__main__":
    run_main(main)
