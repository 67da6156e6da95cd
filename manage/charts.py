"""A chart of intervals, drawn by matplotlib where it is installed (requirements-charts.txt)."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind readers; yellow is left out on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#282828")
UNCLEAR = "#969696"
MISSING = "charts need the package matplotlib; install it: pip install -r requirements-charts.txt"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


class Interval(NamedTuple):
    """A number, the ends of its interval, the numbers that it is the mean of, and whether it is more than chance."""

    label: str
    value: float
    low: float
    high: float
    parts: Sequence[float]
    is_clear: bool


def interval_chart(groups: Mapping[str, Sequence[Interval]], path: Path, title: str, x_label: str) -> None:
    """Draws a panel a group with a row an interval, beside a line at 0; rings are the parts of its mean.

    Clear ones are blue right of 0 and orange left of it, all others grey.
    """
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    heights = [len(rows) + 0.6 for rows in groups.values()]
    figure = Figure(figsize=(9, 1.1 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (heading, rows) in zip(panels, groups.items(), strict=True):
        for y, row in enumerate(rows):
            colour = UNCLEAR if not row.is_clear else COLOURS[0] if row.value > 0 else COLOURS[1]
            axes.plot([row.low, row.high], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
            axes.plot(row.parts, [y] * len(row.parts), "o", color="white", markeredgecolor=colour, markersize=5)
            axes.plot(row.value, y, "o", color=colour, markeredgecolor="white", markersize=9)
        axes.axvline(0, color="#696969", linewidth=1)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(heading, loc="left", fontsize="medium")
        axes.tick_params(left=False)
    figure.suptitle(title, x=0.01, ha="left")
    panels[-1].set_xlabel(x_label)
    finish(figure, panels, "x", path)


def finish(figure, panels: Sequence, grid: str, path: Path) -> None:
    """Takes the frames off, draws the grid and saves."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e4e4e4")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
