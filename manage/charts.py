"""Charts of lines and of intervals, drawn with Pillow alone; drawn large and reduced, so that edges are smooth."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]

# Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind readers; yellow is left out on white.
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (40, 40, 40))
DASHES = ((), (10, 6), (3, 4))  # a second and third round of colours is dashed, then dotted
INK, FAINT, GRID = (34, 34, 34), (105, 105, 105), (228, 228, 228)
SCALE = 3  # drawn this many times larger than it is saved


def line_chart(
    series: Mapping[str, Points],
    path: str | Path,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    size: tuple[int, int] = (900, 480),
) -> None:
    """Draws one line a series of (x, y), and a shaded band of (x, low, high) round those named in `bands`.

    Points that are not finite are left out, so that a line ends where it has no value.

    Raises: ValueError when no series has a point to draw.
    """
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    lines = {name: sorted(points) for name, points in lines.items() if points}
    if not lines:
        raise ValueError(f"{path}: nothing to draw in {', '.join(series) or 'no series'}")
    shades = {name: sorted(b for b in band if all(map(math.isfinite, b))) for name, band in (bands or {}).items()}
    chart = _Chart(lines, shades, size)
    chart.draw_axes(title, x_label, y_label)
    for number, name in enumerate(lines):
        chart.draw_band(shades.get(name, []), COLOURS[number % len(COLOURS)])
    for number, points in enumerate(lines.values()):
        chart.draw_line(points, *_style(number))
    chart.draw_legend(list(lines))
    chart.picture.reduce(SCALE).save(path, optimize=True)


class Interval(NamedTuple):
    """A number, the ends of its interval, the numbers that it is the mean of, and whether it is more than chance."""

    label: str
    value: float
    low: float
    high: float
    parts: Sequence[float]
    is_clear: bool


def interval_chart(
    groups: Mapping[str, Sequence[Interval]], path: str | Path, title: str = "", x_label: str = "", width: int = 900
) -> None:
    """Draws a row an interval under a heading a group, beside a line at 0; rings are the parts of its mean.

    Clear ones are blue right of 0 and orange left of it, all others grey.

    Raises: ValueError when there is nothing to draw.
    """
    rows = [row for group in groups.values() for row in group]
    if not rows:
        raise ValueError(f"{path}: nothing to draw")
    values = [0.0, *(x for row in rows for x in (row.low, row.high, *row.parts))]
    ticks = nice_ticks(min(values), max(values), about=8)
    font = _font(13)
    left = 46 + max(font.getlength(words) / SCALE for words in (*groups, *(row.label for row in rows)))
    right, top, step = width - 26, 54, 26
    bottom = top + step * (len(rows) + len(groups)) + 8
    picture = Image.new("RGB", (width * SCALE, int(bottom + 62) * SCALE), "white")
    draw = ImageDraw.Draw(picture)

    def x_of(value: float) -> float:
        return (left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)) * SCALE

    def text(x: float, y: float, words: str, font, colour, anchor: str) -> None:
        draw.text((x, y * SCALE), words, fill=colour, font=font, anchor=anchor)

    text(26 * SCALE, 14, title, _font(17), INK, "la")
    for tick in ticks:
        colour, thick = (FAINT, 1.6) if tick == 0 else (GRID, 1)
        draw.line([(x_of(tick), top * SCALE), (x_of(tick), bottom * SCALE)], fill=colour, width=round(thick * SCALE))
        text(x_of(tick), bottom + 9, f"{tick:+g}" if tick else "0", font, FAINT, "ma")
    text(x_of((ticks[0] + ticks[-1]) / 2), bottom + 34, x_label, font, FAINT, "ma")
    y = top + step / 2
    for heading, group in groups.items():
        text(26 * SCALE, y, heading, font, INK, "lm")
        y += step
        for row in group:
            text(36 * SCALE, y, row.label, font, FAINT, "lm")
            colour = (150, 150, 150) if not row.is_clear else COLOURS[0] if row.value > 0 else COLOURS[1]
            draw.line([(x_of(row.low), y * SCALE), (x_of(row.high), y * SCALE)], fill=colour, width=4 * SCALE)
            for part in row.parts:
                _circle(draw, x_of(part), y * SCALE, 2.6 * SCALE, "white", colour)
            _circle(draw, x_of(row.value), y * SCALE, 5 * SCALE, colour, "white")
            y += step
    picture.reduce(SCALE).save(path, optimize=True)


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill, outline) -> None:
    draw.ellipse([(x - radius, y - radius), (x + radius, y + radius)], fill=fill, outline=outline, width=SCALE)


def nice_ticks(low: float, high: float, about: int = 6, whole: bool = False) -> list[float]:
    """Round numbers in even steps that enclose [low, high].

    A flat line gets room on both sides, and at 0 only above: what is drawn is never negative there. Flat is also what
    differs by less than the digits of a label can show.
    """
    if high - low <= 1e-4 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1
        low, high = low - pad, high + pad or 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _style(number: int) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


class _Chart:
    """A picture in the making. Positions are in saved pixels; `_up` takes them to drawn ones."""

    def __init__(self, lines: Mapping[str, Points], shades: Mapping, size: tuple[int, int]) -> None:
        self.picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.font, self.bold = _font(13), _font(17)
        xs = [x for points in lines.values() for x, _ in points]
        ys = [y for points in lines.values() for _, y in points]
        ys += [y for band in shades.values() for _, *ends in band for y in ends]
        self.y_ticks = nice_ticks(min(ys), max(ys))
        self.x_low, self.x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (xs[0] - 1, xs[0] + 1)
        whole = all(float(x).is_integer() for x in xs)
        ticks = nice_ticks(self.x_low, self.x_high, about=9, whole=whole)
        self.x_ticks = [tick for tick in ticks if self.x_low <= tick <= self.x_high]
        self.show_points = max(len(points) for points in lines.values()) <= 40
        legend = 52 + max(self._width(name) for name in lines)
        self.left = 26 + max(self._width(_number(tick)) for tick in self.y_ticks)
        self.right = size[0] - legend - 18
        self.top, self.bottom = 66, size[1] - 52

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies, in saved pixels."""
        across = (x - self.x_low) / (self.x_high - self.x_low)
        upwards = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.left + across * (self.right - self.left), self.bottom - upwards * (self.bottom - self.top)

    def draw_axes(self, title: str, x_label: str, y_label: str) -> None:
        self._text((self.left, 14), title, self.bold, INK, "la")
        self._text((self.left, self.top - 12), y_label, self.font, FAINT, "ls")
        for tick in self.y_ticks:
            _, y = self.place(self.x_low, tick)
            self._line([(self.left, y), (self.right, y)], GRID, 1)
            self._text((self.left - 9, y), _number(tick), self.font, FAINT, "rm")
        for tick in self.x_ticks:
            x, _ = self.place(tick, self.y_ticks[0])
            self._line([(x, self.top), (x, self.bottom)], GRID, 1)
            self._line([(x, self.bottom), (x, self.bottom + 5)], INK, 1)
            self._text((x, self.bottom + 9), _number(tick), self.font, FAINT, "ma")
        self._line([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], INK, 1.4)
        self._text(((self.left + self.right) / 2, self.bottom + 30), x_label, self.font, FAINT, "ma")

    def draw_band(self, band: Sequence[tuple[float, float, float]], colour: tuple[int, int, int]) -> None:
        if len(band) < 2:
            return
        edge = [self.place(x, low) for x, low, _ in band] + [self.place(x, high) for x, _, high in reversed(band)]
        mask = Image.new("L", self.picture.size, 0)
        ImageDraw.Draw(mask).polygon([self._up(point) for point in edge], fill=46)
        self.picture.paste(colour, mask=mask)

    def draw_line(self, points: Points, colour: tuple[int, int, int], dashes: tuple[int, ...]) -> None:
        placed = [self.place(x, y) for x, y in points]
        for piece in _dashed(placed, dashes) if dashes else [placed]:
            self._line(piece, colour, 2.2)
        if self.show_points:
            for x, y in placed:
                self._dot(x, y, colour)

    def draw_legend(self, names: Sequence[str]) -> None:
        for number, name in enumerate(names):
            colour, dashes = _style(number)
            y, x = self.top + 10 + 22 * number, self.right + 18
            ends = [(x, y), (x + 24, y)]
            for piece in _dashed(ends, dashes) if dashes else [ends]:
                self._line(piece, colour, 2.6)
            if self.show_points and not dashes:  # a dot would hide the gaps
                self._dot(x + 12, y, colour)
            self._text((x + 32, y), name, self.font, INK, "lm")

    def _line(self, points: Points, colour: tuple[int, int, int], width: float) -> None:
        places = [self._up(point) for point in points]
        if len(places) > 1:
            self.draw.line(places, fill=colour, width=max(1, round(width * SCALE)), joint="curve")

    def _dot(self, x: float, y: float, colour: tuple[int, int, int], radius: float = 3.2) -> None:
        corners = [self._up((x - radius, y - radius)), self._up((x + radius, y + radius))]
        self.draw.ellipse(corners, fill=colour, outline="white", width=SCALE)

    def _text(self, place: tuple[float, float], text: str, font, colour: tuple[int, int, int], anchor: str) -> None:
        self.draw.text(self._up(place), text, fill=colour, font=font, anchor=anchor)

    def _width(self, text: str) -> float:
        return self.font.getlength(text) / SCALE

    @staticmethod
    def _up(point: tuple[float, float]) -> tuple[float, float]:
        return point[0] * SCALE, point[1] * SCALE


def _dashed(points: Points, dashes: tuple[int, ...]) -> list[Points]:
    """The pieces of a broken line that are drawn: `dashes` is (drawn, left out), in pixels."""
    on, off = dashes
    pieces, travelled = [], 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        start = -(travelled % (on + off))
        while start < length:
            a, b = max(start, 0.0), min(start + on, length)
            if b > a:
                ends = [(x0 + (x1 - x0) * t / length, y0 + (y1 - y0) * t / length) for t in (a, b)]
                pieces.append(ends)
            start += on + off
        travelled += length
    return pieces


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


def _number(value: float) -> str:
    return f"{value:g}"
