"""Compares evaluated experiments: configs, scores, differences with their uncertainty, photos.

    python tools/compare.py hseg_bce_100 hseg_tree_min_100
    python tools/compare.py experiments/bce_seed* experiments/tree_min_seed* --evaluation last --out outputs/losses

Experiments that differ only in their seed, trained by equally many processes, form a group; all others are compared
with the first. Writes comparison.html (one file, pictures inside), comparison.md (ready for a README), comparison.tex,
comparison.json, and the photos on which the networks differ most. The evaluations are those of evaluate.py, decoded as
they were there. TensorBoard shows the curves.
"""

import argparse
import base64
import html
import json
import math
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from configs.config import DECODE_RULES
from manage import charts
from manage.comparison import (
    CONFIDENCE,
    SEVERITY,
    Comparison,
    Experiment,
    Group,
    compare,
    load_experiment,
    mean_and_spread,
    unit,
)
from manage.predictor import Predictor
from utils import visualize
from utils.cli import progress, run_main
from utils.dataset import find_samples
from utils.errors import UserError
from utils.files import write_json, write_whole
from utils.images import read_labels, read_photo

PHOTOS = 6  # side by side

Heading = namedtuple("Heading", "text")
Items = namedtuple("Items", "sentences")  # plain, one a line
Table = namedtuple("Table", "header rows")  # the first column names, the others are numbers
Picture = namedtuple("Picture", "title path")
Block = Heading | Items | Table | Picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", metavar="EXP", help="an experiment's folder, or name")
    parser.add_argument("--out", type=Path, default="outputs/comparison", metavar="D", help="default: %(default)s")
    parser.add_argument("--evaluation", default="best", metavar="E", help="best, last, ...: which evaluation")
    arguments = parser.parse_args()
    bar = progress(arguments.experiments, desc="read", leave=False)
    experiments = [load_experiment(name, arguments.evaluation) for name in bar]
    write_report(compare(experiments), arguments.out, "comparison", "Comparison")


def write_report(comparison: Comparison, out: Path, stem: str, title: str, notes: Sequence[str] = ()) -> None:
    """Prints the scores; writes the pictures, <stem>.html, <stem>.md, <stem>.tex and <stem>.json.

    Raises: UserError when `out` cannot be written.
    """
    scores, differences = score_table(comparison), difference_table(comparison)
    widths = [max(map(len, column)) for column in zip(scores.header, *scores.rows, strict=True)]
    for name, *cells in (scores.header, *scores.rows):
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    for difference in comparison.differences:
        print(difference.sentence)
    if not charts.can_draw():
        print(f"without its chart: {charts.MISSING}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        blocks = report(comparison, title, notes, out / stem)
        write_whole(to_html(blocks, title), out / f"{stem}.html")
        write_whole(to_markdown(blocks), out / f"{stem}.md")
        write_whole("\n".join(to_latex(table) for table in (scores, differences) if table.rows), out / f"{stem}.tex")
        write_json(to_record(comparison) | {"notes": list(notes)}, out / f"{stem}.json")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    print(f"wrote {out / stem}.html, .md, .tex and .json")


def report(comparison: Comparison, title: str, notes: Sequence[str], path: Path) -> list[Block]:
    """The whole report; its pictures are drawn to files whose names begin with `path`."""
    groups, photos = comparison.groups, len(comparison.experiments[0].ids)
    seeds = "mean ± standard deviation over seeds" if any(len(g.seeds) > 1 for g in groups) else "one seed"
    about = f"Percent on {photos:,} whole val photos, {seeds}. mIoU is without background, mistake severity a height."
    blocks: list[Block] = [Heading(title), Items([*notes, about]), score_table(comparison)]
    if comparison.differences:
        method = (
            "Differences in points; those of the severity in heights, where less is better. Intervals are from a "
            f"paired bootstrap over the val photos, wide enough to hold for all {len(comparison.differences)} "
            f"comparisons together with {CONFIDENCE:.0%} (Holm). Better or worse is said where the interval leaves out "
            f"0, p, adjusted in the same way, is below {1 - CONFIDENCE:.2f}, and all seeds agree in sign."
        )
        blocks += [Heading("Differences"), *draw_differences(comparison, path), difference_table(comparison)]
        blocks += [Items([method]), *side_by_side(comparison, path)]
    for level, name in enumerate(comparison.hierarchy.level_names):
        blocks += [Heading(f"IoU per class: {name}"), class_table(groups, level)]
    blocks += [Heading("Decoding rules (mIoU1)"), rule_table(comparison)]
    if comparison.differing:
        rows = [[key, *map(json.dumps, values)] for key, values in comparison.differing.items()]
        blocks += [Heading("What differs in the configs"), Table(["key", *(g.label for g in groups)], rows)]
    return [*blocks, Heading("Runs"), run_table(comparison)]


# ---- tables ------------------------------------------------------------------------------------------------------


def score_table(comparison: Comparison) -> Table:
    """All scores; in percent, but that mistakes are as severe as they are high up the tree."""
    names = list(comparison.experiments[0].record["scores"])
    titles = [name.replace("_with_background", " with bg").replace("_", " ") for name in names]
    rows = []
    for group in comparison.groups:
        scores = [_mean(group.values(name), unit(name)) for name in names]
        rows.append([group.label, str(len(group.seeds)), group.experiments[0].config["decode"], *scores])
    return Table(["", "seeds", "decoded by", *titles], rows)


def difference_table(comparison: Comparison) -> Table:
    rows = []
    for d in comparison.differences:
        between = f"{d.shown(d.low)} to {d.shown(d.high)}"
        per_seed = ", ".join(map(d.shown, d.by_seed.values())) or "-"
        rows.append([d.second, d.first, d.title, d.shown(d.value), between, per_seed, f"{d.p:.2g}", d.verdict])
    header = ["", "against", "score", "difference", "interval over photos", "each seed", "p (Holm)", "verdict"]
    return Table(header, rows)


def class_table(groups: Sequence[Group], level: int) -> Table:
    rows = []
    for name in groups[0].experiments[0].record["levels"][level]["IoU"]:
        values = [[e.record["levels"][level]["IoU"][name] for e in group.experiments] for group in groups]
        rows.append([name, *map(_mean, values)])
    return Table(["class", *(group.label for group in groups)], rows)


def rule_table(comparison: Comparison) -> Table:
    """mIoU1 of each group under each decoding rule that all were scored with."""
    shared = [r for r in DECODE_RULES if all(r in e.record["rules"] for e in comparison.experiments)]
    rows = []
    for group in comparison.groups:
        values = [[e.record["rules"][rule]["mIoU1"] for e in group.experiments] for rule in shared]
        rows.append([group.label, *map(_mean, values)])
    return Table(["", *shared], rows)


def run_table(comparison: Comparison) -> Table:
    rows = []
    for e in comparison.experiments:
        seconds = e.curves[-1].get("train_seconds") if e.curves else None
        minutes = "-" if seconds is None else f"{seconds / 60:.1f}"
        epoch = f"{e.record['epoch']} of {e.config['n_epochs']}"
        rows.append([e.name, str(e.seed), epoch, minutes, e.said("commit"), e.said("hardware")])
    return Table(["run", "seed", "epoch", "train minutes", "commit", "hardware"], rows)


def _mean(values: Sequence[float | None], factor: float = 100) -> str:
    """`41.20 ± 0.31`, in percent."""
    mean, spread = (None if v is None else f"{factor * v:.2f}" for v in mean_and_spread(values))
    return "-" if mean is None else mean if spread is None else f"{mean} ± {spread}"


def to_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON types; scores in [0, 1]."""
    differences = [vars(d) | {"verdict": d.verdict, "sentence": d.sentence} for d in comparison.differences]
    differences = [{k: None if v != v else v for k, v in record.items()} for record in differences]  # NaN is no JSON
    groups = {
        group.label: [
            {"run": e.name, "seed": e.seed, "commit": e.said("commit")}
            | {key: e.record[key] for key in ("decode", "rules", "levels")}
            for e in group.experiments
        ]
        for group in comparison.groups
    }
    return {"photos": len(comparison.experiments[0].ids), "differences": differences, "groups": groups}


# ---- pictures ----------------------------------------------------------------------------------------------------


def draw_differences(comparison: Comparison, path: Path) -> list[Picture]:
    """Each group against the first at each level: difference, interval over photos, a ring for each seed."""
    rows: dict[str, list[charts.Interval]] = {}
    for d in comparison.differences:
        if d.score != SEVERITY and all(map(math.isfinite, (d.value, d.low, d.high))):
            value, low, high, *seeds = (100 * v for v in (d.value, d.low, d.high, *d.by_seed.values()))
            is_clear = d.verdict in ("better", "worse") and len(d.by_seed) > 1  # one seed may be any seed
            rows.setdefault(d.title, []).append(charts.Interval(d.second, value, low, high, seeds, is_clear))
    if not rows or not charts.can_draw():
        return []
    picture = Picture("differences", path.with_name(f"{path.name}_differences.png"))
    about = "bar: interval over photos, for all together; ring: one seed; coloured: better or worse, with several seeds"
    charts.interval_chart(rows, picture.path, f"difference from {comparison.groups[0].label}", about)
    return [picture]


def side_by_side(comparison: Comparison, path: Path) -> list[Block]:
    """The photos on which the groups' pixel accuracies differ most, each with what every group's first run says."""
    first = [group.experiments[0] for group in comparison.groups]
    hits = np.stack([e.matrices.diagonal(axis1=1, axis2=2).sum(1) for e in first])  # (G, P)
    accuracy = hits / np.maximum(first[0].matrices.sum(axis=(1, 2)), 1)
    chosen = [first[0].ids[i] for i in np.argsort(-np.ptp(accuracy, axis=0), kind="stable")[:PHOTOS]]
    try:
        sheet = draw_photos(first, [group.label for group in comparison.groups], chosen)
    except UserError as error:
        print(f"no photos side by side: {error}")
        return []
    picture = Picture("photos side by side", path.with_name(f"{path.name}_photos.jpg"))
    Image.fromarray(sheet).save(picture.path, quality=88)
    return [Heading("Where the networks differ most"), picture]


def draw_photos(experiments: Sequence[Experiment], labels: Sequence[str], ids: Sequence[str]) -> np.ndarray:
    """A row a photo: photo, truth, and what each network says. Shape: -> (h, w, 3) uint8.

    Raises: UserError when a checkpoint or a photo is no longer there.
    """
    rows: list[list[np.ndarray]] = []
    for e in experiments:
        checkpoint = e.folder / "models_checkpoints" / e.record["checkpoint"]
        predictor = Predictor.load(checkpoint, decode=e.config["decode"])
        files = find_samples(ids, predictor.config.images_dir, predictor.config.labels_dir)
        if not rows:
            photos = [np.array(read_photo(file.photo)) for file in files]
            truths = [read_labels(file.labels) for file in files]
            rows = [[p, visualize.overlay(p, t, e.hierarchy)] for p, t in zip(photos, truths, strict=True)]
        for row, file in zip(rows, files, strict=True):
            row.append(visualize.overlay(row[0], predictor.predict_file(file.photo).leaves, e.hierarchy))
    return visualize.gallery(rows, ["photo", "truth", *labels], experiments[0].hierarchy)


# ---- formats -----------------------------------------------------------------------------------------------------


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


def to_latex(table: Table) -> str:
    """For \\usepackage{booktabs}."""
    escapes = {c: f"\\{c}" for c in "&%$#_{}"} | {"±": "$\\pm$", "\\": "\\textbackslash{}"}
    lines = [" & ".join(cell.translate(str.maketrans(escapes)) for cell in row) for row in (table.header, *table.rows)]
    columns = f"l{'r' * (len(table.header) - 1)}"
    body = [lines[0] + " \\\\", "\\midrule", *(f"{line} \\\\" for line in lines[1:])]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", "\\toprule", *body, "\\bottomrule", "\\end{tabular}", ""])


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1320px; padding: 0 1rem; }}
h1, h2 {{ font-weight: 600; line-height: 1.2; }} h2 {{ margin: 2.2rem 0 .6rem; font-size: 1.2rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }}
th {{ color: #555; font-weight: 600; }} th:first-child, td:first-child {{ text-align: left; }}
tbody tr:hover {{ background: #f6f8fa; }} .better {{ color: #00704f; }} .worse {{ color: #b34700; }}
img {{ max-width: 100%; height: auto; }} li {{ margin: .2rem 0; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(blocks: Sequence[Block], title: str) -> str:
    """One file that needs nothing else: pictures are inside."""
    body = "\n".join(_html(block, is_first=number == 0) for number, block in enumerate(blocks))
    return PAGE.format(title=html.escape(title), body=body)


def _html(block: Block, is_first: bool) -> str:
    match block:
        case Heading(text):
            tag = "h1" if is_first else "h2"
            return f"<{tag}>{html.escape(text)}</{tag}>"
        case Items(sentences):
            return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"
        case Picture(name, path):
            data, kind = base64.b64encode(path.read_bytes()).decode("ascii"), path.suffix[1:].replace("jpg", "jpeg")
            return f'<p><img alt="{html.escape(name)}" src="data:image/{kind};base64,{data}"></p>'
        case Table(header, rows):
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
            lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = f' class="{text}"' if text in ("better", "worse") else ""
    return f"<td{kind}>{html.escape(text)}</td>"


if __name__ == "__main__":
    run_main(main)
