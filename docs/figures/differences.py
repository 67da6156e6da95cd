"""Draws the differences of a comparison: a panel a level, an interval over photos a group, a ring a seed.

    python docs/figures/differences.py outputs/comparison/comparison.json

Writes <name>_differences.png beside the file, which tools/compare.py or tools/experiment.py wrote. Clear differences
are blue right of 0 and orange left of it; one seed may be any seed, so it is never clear. Needs matplotlib
(requirements-charts.txt).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would look for a screen

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#969696"  # told apart by colour-blind readers
LEGEND = "bar: interval over photos, for all together; ring: one seed; coloured: better or worse"


def panel(axes: Axes, differences: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> None:
    """One score's differences, as the records of a comparison hold them, each in the row of its name."""
    for d in differences:
        is_clear, seeds = d["verdict"] in ("better", "worse") and len(d["by_seed"]) > 1, d["by_seed"].values()
        colour, y = GREY if not is_clear else BLUE if d["value"] > 0 else ORANGE, names.index(d["second"])
        axes.plot([100 * d["low"], 100 * d["high"]], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
        rings = {"color": "white", "markeredgecolor": colour, "markersize": 5}
        axes.plot([100 * value for value in seeds], [y] * len(seeds), "o", **rings)
        axes.plot(100 * d["value"], y, "o", color=colour, markeredgecolor="white", markersize=9)
    axes.axvline(0, color="#696969", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(axis="x", color="#e4e4e4")


def draw(record: dict) -> Figure:
    levels, others = record["levels"], list(record["groups"])[1:]
    figure = Figure(figsize=(9, 1.3 + len(levels) * (0.3 * len(others) + 0.3)), layout="constrained")
    panels = figure.subplots(len(levels), sharex=True, squeeze=False)[:, 0]
    for level, (axes, name) in enumerate(zip(panels, levels, strict=True), start=1):
        differences = [d for d in record["differences"] if d["score"] == f"mIoU{level}"]
        panel(axes, differences, others, f"mIoU{level} ({name})")
    figure.suptitle(f"difference from {next(iter(record['groups']))} in points", x=0.01, ha="left")
    panels[-1].set_xlabel(LEGEND)
    return figure


if __name__ == "__main__":
    path = Path(sys.argv[1])
    draw(json.loads(path.read_text(encoding="utf-8"))).savefig(path.with_name(f"{path.stem}_differences.png"), dpi=130)
