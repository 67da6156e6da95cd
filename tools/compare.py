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
import mimetypes
import re
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import markdown  # comes with tensorboard
import numpy as np
from PIL import Image

from configs.config import DECODE_RULES
from manage.comparison import CONFIDENCE, SEVERITY, Comparison, Experiment, compare, load_experiment, mean_and_spread
from manage.predictor import Predictor
from manage.tables import Table, to_markdown
from utils import visualize
from utils.cli import progress, run_main
from utils.dataset import find_samples
from utils.errors import UserError
from utils.files import write_json, write_whole
from utils.images import read_labels, read_photo

PHOTOS = 6  # side by side


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
    """Prints the scores; writes the photos side by side, <stem>.html, .md, .tex and .json. Raises: OSError."""
    tables = [score_table(comparison)] + ([difference_table(comparison)] if comparison.differences else [])
    print("\n\n".join(map(to_markdown, tables)))
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(report(comparison, title, notes, out / stem)) + "\n"
    write_whole(text, out / f"{stem}.md")
    write_whole(to_html(text, title, out), out / f"{stem}.html")
    write_whole("\n".join(map(to_latex, tables)), out / f"{stem}.tex")
    write_json(to_record(comparison) | {"notes": list(notes)}, out / f"{stem}.json")
    print(f"wrote {out / stem}.html, .md, .tex and .json")


def report(comparison: Comparison, title: str, notes: Sequence[str], path: Path) -> list[str]:
    """The whole report in Markdown, block by block; its picture is drawn to a file whose name begins with `path`."""
    photos, names = len(comparison.experiments[0].ids), [group.label for group in comparison.groups]
    about = (
        f"Percent on {photos:,} whole val photos; mean ± standard deviation where there are several seeds. mIoU is "
        "without background, mistake severity a height."
    )
    blocks = [f"# {title}", "\n".join(f"- {note}" for note in [*notes, about]), to_markdown(score_table(comparison))]
    if comparison.differences:
        method = (
            "Differences in points; those of the severity in heights, where less is better. Intervals are from a "
            f"paired bootstrap over the val photos, wide enough to hold for all {len(comparison.differences)} "
            f"comparisons together with {CONFIDENCE:.0%} (Holm). Better or worse is said where the interval leaves out "
            f"0, p, adjusted in the same way, is below {1 - CONFIDENCE:.2f}, and all seeds agree in sign."
        )
        blocks += ["## Differences", to_markdown(difference_table(comparison)), method]
        blocks += side_by_side(comparison, path.with_name(f"{path.name}_photos.jpg"))
    for level, name in enumerate(comparison.experiments[0].hierarchy.level_names):
        ious = {c: ("levels", level, "IoU", c) for c in comparison.experiments[0].record["levels"][level]["IoU"]}
        rows = [[c, *(mean(comparison, group, place) for group in range(len(names)))] for c, place in ious.items()]
        blocks += [f"## IoU per class: {name}", to_markdown([["class", *names], *rows])]
    shared = [r for r in DECODE_RULES if all(r in e.record["rules"] for e in comparison.experiments)]
    rows = [[name, *(mean(comparison, i, ("rules", r, "mIoU1")) for r in shared)] for i, name in enumerate(names)]
    blocks += ["## Decoding rules (mIoU1)", to_markdown([["", *shared], *rows])]
    if comparison.differing:
        rows = [[key, *map(json.dumps, values)] for key, values in comparison.differing.items()]
        blocks += ["## What differs in the configs", to_markdown([["key", *names], *rows])]
    return [*blocks, "## Runs", to_markdown(run_table(comparison.experiments))]


# ---- tables ------------------------------------------------------------------------------------------------------


def mean(comparison: Comparison, group: int, place: Sequence[str | int], factor: float = 100) -> str:
    """`41.20 ± 0.31`, in percent: of what stands at a place of the records of a group."""
    values = [reduce(lambda part, key: part[key], place, e.record) for e in comparison.groups[group].experiments]
    found = [f"{factor * v:.2f}" for v in mean_and_spread(values) if v == v]  # NaN is not equal to itself
    return " ± ".join(found) or "-"


def score_table(comparison: Comparison) -> Table:
    """All scores; in percent, but that mistakes are as severe as they are high up the tree."""
    names = list(comparison.experiments[0].record["scores"])
    rows = [["", "seeds", "decoded by", *(n.replace("_with_background", " with bg").replace("_", " ") for n in names)]]
    for i, group in enumerate(comparison.groups):
        scores = [mean(comparison, i, ("scores", name), 1 if name == SEVERITY else 100) for name in names]
        rows.append([group.label, str(len(group.experiments)), group.experiments[0].config["decode"], *scores])
    return rows


def difference_table(comparison: Comparison) -> Table:
    names = comparison.experiments[0].hierarchy.level_names
    titles = {f"mIoU{level}": f"mIoU{level} ({name})" for level, name in enumerate(names, start=1)}
    rows = [["", "against", "score", "difference", "interval over photos", "each seed", "p (Holm)", "verdict"]]
    for d in comparison.differences:
        value, low, high, *seeds = (
            f"{v:+.3f}" if d.score == SEVERITY else f"{100 * v:+.2f}"
            for v in (d.value, d.low, d.high, *d.by_seed.values())
        )
        numbers = [value, f"{low} to {high}", ", ".join(seeds) or "-", f"{d.p:.2g}"]
        rows.append([d.second, d.first, titles.get(d.score, "severity"), *numbers, d.verdict])
    return rows


def run_table(experiments: Sequence[Experiment]) -> Table:
    rows = [["run", "seed", "epoch", "commit", "hardware"]]
    for e in experiments:
        epoch = f"{e.record['epoch']} of {e.config['n_epochs']}"
        rows.append([e.name, str(e.config["seed"]), epoch, e.said("commit"), e.said("hardware")])
    return rows


def to_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON types; scores in [0, 1]."""
    differences = [vars(d) | {"verdict": d.verdict} for d in comparison.differences]
    return {
        "photos": len(comparison.experiments[0].ids),
        "levels": comparison.experiments[0].hierarchy.level_names,
        # NaN is no JSON
        "differences": [{key: None if v != v else v for key, v in record.items()} for record in differences],
        "groups": {
            group.label: [
                {"run": e.name, "seed": e.config["seed"], "commit": e.said("commit")}
                | {key: e.record[key] for key in ("decode", "rules", "levels")}
                for e in group.experiments
            ]
            for group in comparison.groups
        },
    }


# ---- photos ------------------------------------------------------------------------------------------------------


def side_by_side(comparison: Comparison, path: Path) -> list[str]:
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
    Image.fromarray(sheet).save(path, quality=88)
    return ["## Where the networks differ most", f"![photos side by side]({path.name})"]


def draw_photos(experiments: Sequence[Experiment], labels: Sequence[str], ids: Sequence[str]) -> np.ndarray:
    """A row a photo: photo, truth, and what each network says. Shape: -> (h, w, 3) uint8.

    Raises: UserError when a checkpoint or a photo is no longer there.
    """
    rows: list[list[np.ndarray]] = []
    for e in experiments:
        checkpoint = e.folder / "models_checkpoints" / e.record["checkpoint"]
        how = {key: e.record.get(key) for key in ("decode", "root_bias", "tta", "tile")}
        predictor = Predictor.load(checkpoint, **how)
        files = find_samples(ids, predictor.config.images_dir, predictor.config.labels_dir)
        if not rows:
            photos = [np.array(read_photo(file.photo)) for file in files]
            truths = [read_labels(file.labels) for file in files]
            rows = [[p, visualize.overlay(p, t, e.hierarchy)] for p, t in zip(photos, truths, strict=True)]
        for row, file in zip(rows, files, strict=True):
            row.append(visualize.overlay(row[0], predictor.predict_file(file.photo).leaves, e.hierarchy))
    return visualize.gallery(rows, ["photo", "truth", *labels], experiments[0].hierarchy)


# ---- formats -----------------------------------------------------------------------------------------------------


def to_latex(table: Table) -> str:
    """For \\usepackage{booktabs}."""
    escapes = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"±": "$\\pm$", "\\": "\\textbackslash{}"})
    head, *body = (" & ".join(cell.translate(escapes) for cell in row) + " \\\\" for row in table)
    begin = f"\\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}"
    return "\n".join([begin, "\\toprule", head, "\\midrule", *body, "\\bottomrule", "\\end{tabular}", ""])


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1320px; padding: 0 1rem; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #e2e2e2; white-space: nowrap; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(text: str, title: str, folder: Path) -> str:
    """The page of a report, one file that needs no other: the pictures, which lie in `folder`, are inside."""

    def inside(picture: re.Match) -> str:
        data = base64.b64encode((folder / picture[1]).read_bytes()).decode("ascii")
        return f'src="data:{mimetypes.guess_type(picture[1])[0]};base64,{data}"'

    body = markdown.markdown(html.escape(text, quote=False), extensions=["tables"])
    return PAGE.format(title=html.escape(title), body=re.sub(r'src="([^"]+)"', inside, body))


if __name__ == "__main__":
    run_main(main)
