"""Draws the figures of docs/method.md, each computed by the code that it explains.

    python docs/figures/method_figures.py                  # writes docs/figures/{tree,labels,gradient,paths,rules}.png
    python docs/figures/method_figures.py --out /tmp/figures

The tree is configs/hierarchies/pascal_part.json. Takes a few seconds; the pictures come out the same every time.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.cli import run_main
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy
from utils.losses import build_criterion

REPOSITORY = Path(__file__).resolve().parents[2]
FINE = 4  # drawn this much larger, then reduced: PIL does not smooth the edges of shapes
SHARP = 2  # of which this much is kept, for screens with small pixels

INK, GREY, PALE, WHITE = (30, 30, 30), (120, 120, 120), (225, 225, 225), (255, 255, 255)
BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)  # Okabe and Ito: safe for colour-blind readers
Point = tuple[float, float]


class Sheet:
    """A white picture with coordinates in points, whatever its resolution."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.picture = Image.new("RGB", (width * FINE, height * FINE), WHITE)
        self.draw = ImageDraw.Draw(self.picture)

    def text(self, at: Point, text: str, size: float = 12, fill: tuple = INK, anchor: str = "mm") -> None:
        font = ImageFont.load_default(size * FINE)
        self.draw.text(_fine(at), text, fill=fill, font=font, anchor=anchor)

    def line(self, start: Point, end: Point, fill: tuple = GREY, width: float = 1) -> None:
        self.draw.line([*_fine(start), *_fine(end)], fill=fill, width=round(width * FINE))

    def box(self, at: Point, size: Point, fill: tuple | None, outline: tuple | None = None, radius: float = 0) -> None:
        corner = at[0] + size[0], at[1] + size[1]
        self.draw.rounded_rectangle([*_fine(at), *_fine(corner)], radius * FINE, fill, outline, round(1.2 * FINE))

    def dot(self, at: Point, radius: float, fill: tuple) -> None:
        self.draw.ellipse([*_fine((at[0] - radius, at[1] - radius)), *_fine((at[0] + radius, at[1] + radius))], fill)

    def save(self, path: Path) -> None:
        width, height = self.size
        reduced = self.picture.resize((width * SHARP, height * SHARP), Image.Resampling.LANCZOS)
        reduced.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _fine(at: Point) -> Point:
    return at[0] * FINE, at[1] * FINE


# ---- the tree --------------------------------------------------------------------------------------------------


def positions(h: Hierarchy, width: float, height: float) -> dict[int, Point]:
    """Leaves side by side in the order of the tree, parents over the middle of their children."""
    leaves = [v for v in h.preorder if not h.children[v]]
    x = {leaf: width * (i + 0.5) / len(leaves) for i, leaf in enumerate(leaves)}
    for v in reversed(h.preorder):
        if h.children[v]:
            x[v] = sum(x[child] for child in h.children[v]) / len(h.children[v])
    return {v: (x[v], height * (len(h.paths[v]) - 0.5) / h.num_levels) for v in range(h.num_nodes)}


def draw_tree(
    sheet: Sheet, h: Hierarchy, at: Point, size: Point, fill: Callable[[int], tuple], label: Callable[[int], str]
) -> None:
    spots = {v: (at[0] + x, at[1] + y) for v, (x, y) in positions(h, *size).items()}
    for parent, child in h.edges:
        sheet.line(spots[parent], spots[child])
    wide, high = size[0] / h.num_leaves - 6, 34
    for v, (x, y) in spots.items():
        colour = fill(v)
        sheet.box((x - wide / 2, y - high / 2), (wide, high), colour, GREY, radius=6)
        ink = WHITE if sum(colour) < 330 else INK
        sheet.text((x, y - 7), h.names[v], 11, ink)
        sheet.text((x, y + 8), label(v), 11, ink)


def tree_figure(h: Hierarchy) -> Sheet:
    """The tree, its ids and colours, and the classes of each level."""
    sheet, bottom = Sheet(860, 330), 210
    draw_tree(sheet, h, (60, 10), (790, bottom), lambda v: h.colours[v], lambda v: f"id {v}")
    for depth in range(h.num_levels):
        sheet.text((8, 10 + bottom * (depth + 0.5) / h.num_levels), f"depth {depth + 1}", 11, GREY, "lm")
    sheet.line((8, bottom + 18), (850, bottom + 18), PALE)
    for level, classes in enumerate(h.level_classes):
        names = ", ".join(h.names[v] for v in classes)
        title = f"level {level + 1} ({h.level_names[level]}):"
        y = bottom + 42 + 28 * level
        sheet.text((8, y), title, 12, INK, "lm")
        sheet.text((128, y), f"{len(classes)} classes   {names}", 12, INK, "lm")
    return sheet


def labels_figure(h: Hierarchy) -> Sheet:
    """What three labels say about each node, from the table that the losses use."""
    look = {1: ((86, 180, 233), "1"), -1: (WHITE, "0"), 0: (PALE, "?")}
    sheet = Sheet(860, 600)
    for row, (name, column) in enumerate(
        [
            ("head", h.names.index("head")),
            ("upper_body", h.names.index("upper_body")),
            ("void", h.num_nodes),
        ]
    ):
        signs = h.signs("cpu")[:, column].int().tolist()
        top = 200 * row
        sheet.text((8, top + 16), f"label: {name}", 14, INK, "lm")
        draw_tree(
            sheet,
            h,
            (60, top + 18),
            (790, 170),
            lambda v, signs=signs: look[signs[v]][0],
            lambda v, signs=signs: look[signs[v]][1],
        )
        if row:
            sheet.line((8, top), (850, top), PALE)
    return sheet


# ---- what the gradient reaches -----------------------------------------------------------------------------------


def worked_pixel(h: Hierarchy) -> tuple[Tensor, Tensor]:
    """A head with logits head 2, upper_body 1, body -1, all others -3. Shape: (1, N, 1, 1), (1, 1, 1)."""
    logits = torch.full((1, h.num_nodes, 1, 1), -3.0)
    for name, logit in (("head", 2.0), ("upper_body", 1.0), ("body", -1.0)):
        logits[0, h.names.index(name)] = logit
    return logits, torch.full((1, 1, 1), h.names.index("head"))


def gradient_figure(h: Hierarchy) -> Sheet:
    """Minus the gradient of three losses by each logit: where the next step pushes."""
    logits, labels = worked_pixel(h)
    columns = {}
    for title, spec in (
        ("bce", "bce"),
        ("tree_min", "tree_min"),
        ("tree_min + bce", {"tree_min": 1.0, "bce": 1.0}),
    ):
        variable = logits.clone().requires_grad_()
        build_criterion(spec, h)(variable, labels).backward()
        columns[title] = -variable.grad[0, :, 0, 0]
    sheet, top, step, left, wide = Sheet(860, 70 + 26 * h.num_nodes), 52, 26, 190, 220
    reach = max(push.abs().max().item() for push in columns.values())
    sheet.text((95, 30), "node", 12, GREY, "rm")
    sheet.text((150, 30), "logit", 12, GREY)
    for row, v in enumerate(h.preorder):
        y = top + step * (row + 0.5)
        sheet.text((95, y), h.names[v], 12, INK, "rm")
        sheet.text((150, y), f"{logits[0, v, 0, 0].item():+.0f}")
    for column, (title, push) in enumerate(columns.items()):
        middle = left + wide * (column + 0.3)
        sheet.text((middle, 14), title, 13)
        sheet.text((middle, 32), "pushed down | up", 10, GREY)
        sheet.line((middle, top), (middle, top + step * h.num_nodes), GREY)
        for row, v in enumerate(h.preorder):
            y, value = top + step * (row + 0.5), push[v].item()
            length = (wide * 0.46 if value > 0 else wide * 0.2) * value / reach
            low, high = sorted((middle, middle + length))
            sheet.box((low, y - 8), (high - low, 16), BLUE if value > 0 else ORANGE)
            text = "0" if value == 0 else f"{value:+.2f}"
            sheet.text((high + 4, y), text, 11, ORANGE if value == 0 and v in h.paths[labels.item()] else INK, "lm")
    return sheet


# ---- which path a rule takes -------------------------------------------------------------------------------------


def path_probabilities(scores: Tensor, h: Hierarchy) -> dict[int, float]:
    """Log-probability that exactly the leaf's path is on, for independent nodes. Shape: (N,) -> one a leaf."""
    answer = {}
    for leaf in h.leaves:
        on_path = torch.zeros(h.num_nodes, dtype=torch.bool)
        on_path[list(h.paths[leaf])] = True
        answer[leaf] = torch.where(on_path, scores, 1 - scores).log().sum().item()
    return answer


def paths_figure(h: Hierarchy) -> Sheet:
    """One pixel: the exact log-probability of each leaf's path against two rules' sums."""
    values = {
        "background": 2.2,
        "body": 0.5,
        "upper_body": 0.6,
        "head": 0.4,
        "torso": -0.6,
        "up_hand": -1.3,
        "low_leg": -0.9,
    }
    logits = torch.tensor([values.get(name, -2.0) for name in h.names], dtype=torch.float64)
    exact = path_probabilities(logits.sigmoid(), h)
    sums = {
        "logit_sum": {leaf: logits[list(h.paths[leaf])].sum().item() for leaf in h.leaves},
        "prob_sum": {leaf: logits.sigmoid()[list(h.paths[leaf])].sum().item() for leaf in h.leaves},
    }
    sheet = Sheet(860, 380)
    for panel, (rule, scores) in enumerate(sums.items()):
        answer = DECODERS[rule](logits.view(1, -1, 1, 1), h).item()
        scatter(sheet, h, (60 + 430 * panel, 50), (340, 270), scores, exact, answer)
        sheet.text((230 + 430 * panel, 20), f"{rule} answers {h.names[answer]}", 14)
        sheet.text((230 + 430 * panel, 355), f"{rule} of the leaf's path", 12, GREY)
    sheet.text((60, 40), "log-probability of the path", 11, GREY, "lm")
    return sheet


def scatter(
    sheet: Sheet,
    h: Hierarchy,
    at: Point,
    size: Point,
    x: dict[int, float],
    y: dict[int, float],
    chosen: int,
) -> None:
    sheet.line((at[0], at[1] + size[1]), (at[0] + size[0], at[1] + size[1]))
    sheet.line(at, (at[0], at[1] + size[1]))

    def scaled(values: dict[int, float], length: float) -> dict[int, float]:
        low, high = min(values.values()), max(values.values())
        return {v: length * (0.06 + 0.82 * (value - low) / (high - low)) for v, value in values.items()}

    across, up = scaled(x, size[0]), scaled(y, size[1])
    best = max(y, key=y.__getitem__)
    for leaf in h.leaves:
        spot = at[0] + across[leaf], at[1] + size[1] - up[leaf]
        colour = GREEN if leaf == best else (ORANGE if leaf == chosen else GREY)
        sheet.dot(spot, 5, colour)
        note = f" {x[leaf]:.1f}" + (" (most probable)" if leaf == best else "")
        anchor, shift = ("rm", -9) if across[leaf] > 0.5 * size[0] else ("lm", 9)
        sheet.text((spot[0] + shift, spot[1]), h.names[leaf] + note, 11, INK, anchor)


def rules_figure(h: Hierarchy) -> Sheet:
    """Where each rule answers background, by the score of background and the common score of all other nodes."""
    side, gap, top = 140, 26, 60
    steps = torch.linspace(0.5 / side, 1 - 0.5 / side, side)
    logits = steps.logit().view(1, 1, side, 1).flip(2).expand(1, h.num_nodes, side, side).clone()  # up: others
    logits[0, h.names.index("background")] = steps.logit().view(1, side)  # right: background
    sheet = Sheet(40 + len(DECODERS) * (side + gap), 270)
    shades = torch.tensor([WHITE, (86, 180, 233)], dtype=torch.uint8)
    for panel, (rule, decoder) in enumerate(DECODERS.items()):
        left = 40 + panel * (side + gap)
        is_background = (decoder(logits, h)[0] == h.names.index("background")).long()
        picture = Image.fromarray(shades[is_background].numpy())
        picture = picture.resize((side * FINE, side * FINE), Image.Resampling.NEAREST)
        sheet.picture.paste(picture, (left * FINE, top * FINE))
        sheet.box((left, top), (side, side), None, GREY)
        sheet.text((left + side / 2, top - 14), rule, 13)
        sheet.dot((left + side * 0.99, top + side * 0.5), 4, ORANGE)
        sheet.text((left + side / 2, top + side + 14), "score of background", 10, GREY)
    sheet.text((8, top - 14), "score of", 9, GREY, "lm")
    sheet.text((8, top - 4), "all else", 9, GREY, "lm")
    for y, number in ((top + 6, "1"), (top + side - 6, "0")):
        sheet.text((34, y), number, 10, GREY, "rm")
    sheet.text((40, 16), "blue: the answer is background; white: it is a body part", 12, INK, "lm")
    sheet.dot((44, 246), 4, ORANGE)
    sheet.text((54, 246), "background 0.99, all else 0.5", 12, INK, "lm")
    return sheet


FIGURES: dict[str, Callable[[Hierarchy], Sheet]] = {
    "tree": tree_figure,
    "labels": labels_figure,
    "gradient": gradient_figure,
    "paths": paths_figure,
    "rules": rules_figure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "figures", help="folder for the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    h = Hierarchy.load(REPOSITORY / "configs" / "hierarchies" / "pascal_part.json")
    for name, figure in FIGURES.items():
        figure(h).save(out / f"{name}.png")
        print(out / f"{name}.png")


if __name__ == "__main__":
    run_main(main)
