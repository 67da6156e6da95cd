"""Charts of lines, for the pictures of the pages."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind readers; yellow is left out on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#282828")
DASHES = ("-", "--", ":")  # a second and third round of colours is dashed, then dotted


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str, x_label: str, y_label: str
) -> None:
    """Draws one line a series of (x, y). A line ends where its points are not finite."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(series.items()):
        points = sorted(p for p in points if all(map(math.isfinite, p)))
        if points:
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
            axes.plot(*zip(*points, strict=True), dash, color=colour, marker="o", markersize=3, label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
