"""Charts of lines and of intervals, drawn by matplotlib where it is installed (requirements-charts.txt)."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

Points = Sequence[tuple[float, float]]

# Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind readers; yellow is left out on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#282828")
DASHES = ("-", "--", ":")  # a second and third round of colours is dashed, then dotted
UNCLEAR = "#969696"


MISSING = "charts need the package matplotlib; install it: pip install -r requirements-charts.txt"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def line_chart(
    series: Mapping[str, Points],
    path: str | Path,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> None:
    """Draws one line a series of (x, y), and a shaded band of (x, low, high) round those named in `bands`.

    Points that are not finite are left out, so that a line ends where it has no value.

    Raises: ValueError when no series has a point to draw, UserError where matplotlib is missing.
    """
    lines = {name: sorted(p for p in points if all(map(math.isfinite, p))) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        raise ValueError(f"{path}: nothing to draw in {', '.join(series) or 'no series'}")
    figure = _figure(4.8)
    axes = figure.subplots()
    marker = "o" if max(map(len, lines.values())) <= 40 else ""
    for number, (name, points) in enumerate(lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        axes.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, markersize=4, label=name)
        if band := sorted(b for b in (bands or {}).get(name, []) if all(map(math.isfinite, b))):
            axes.fill_between(*zip(*band, strict=True), color=colour, alpha=0.18, linewidth=0)
    if all(float(x).is_integer() for points in lines.values() for x, _ in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    _finish(figure, [axes], "both", path)


class Interval(NamedTuple):
    """A number, the ends of its interval, the numbers that it is the mean of, and whether it is more than chance."""

    label: str
    value: float
    low: float
    high: float
    parts: Sequence[float]
    is_clear: bool


def interval_chart(groups: Mapping[str, Sequence[Interval]], path: Path, title: str = "", x_label: str = "") -> None:
    """Draws a panel a group with a row an interval, beside a line at 0; rings are the parts of its mean.

    Clear ones are blue right of 0 and orange left of it, all others grey.

    Raises: ValueError when there is nothing to draw, UserError where matplotlib is missing.
    """
    if not any(groups.values()):
        raise ValueError(f"{path}: nothing to draw")
    heights = [len(rows) + 0.6 for rows in groups.values()]
    figure = _figure(1.1 + 0.3 * sum(heights))
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
    _finish(figure, panels, "x", path)


def _figure(height: float):
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a screen
    except ImportError:
        raise UserError(MISSING) from None
    return Figure(figsize=(9, height), layout="constrained")


def _finish(figure, panels: Sequence, grid: str, path: str | Path) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e4e4e4")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
