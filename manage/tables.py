"""Scores as flat records, tables on screen and CSV."""

import csv
from pathlib import Path
from typing import Any

from utils.hierarchy import Hierarchy

Table = list[list[str]]  # rows of cells, the header first; the first column names, the others are numbers


def summary(result: dict[str, Any]) -> dict[str, float | None]:
    """The scores that stand for a whole run: all that are one number, in [0, 1] but for `mistake_severity`."""
    names = [f"mIoU{level['level']}{end}" for end in ("", "_with_background") for level in result["levels"]]
    errors = [name for name in result if name.startswith("ECE_")]
    return {name: result[name] for name in [*names, "pixel_accuracy", "violation_rate", "mistake_severity", *errors]}


def per_class(result: dict[str, Any]) -> list[tuple[int, str, float | None]]:
    """(level, class, IoU) of every class at every level."""
    return [(level["level"], name, iou) for level in result["levels"] for name, iou in level["IoU"].items()]


def table(result: dict[str, Any], hierarchy: Hierarchy) -> str:
    """IoU per class and level, and all other scores, as people read them."""
    rows = [["level", "class", "IoU"]]
    for level in result["levels"]:
        means = {f"mIoU{level['level']}": level["mIoU"]}
        if hierarchy.background:
            means["with background"] = level["mIoU_with_background"]
        rows += [[level["name"], name, percent(iou)] for name, iou in (level["IoU"] | means).items()]
    others = {name: value for name, value in summary(result).items() if not name.startswith("mIoU")}
    rows += [["", name.replace("_", " "), shown(name, value)] for name, value in others.items()]
    return to_markdown(rows)


def rules_table(rules: dict[str, dict[str, float | None]]) -> str:
    """One row a decoding rule."""
    names = [name for name in next(iter(rules.values())) if "_with_background" not in name and "ECE_" not in name]
    rows = [[rule, *(shown(name, scores[name]) for name in names)] for rule, scores in rules.items()]
    return to_markdown([["decoding", *names], *rows])


def to_markdown(table: Table) -> str:
    """In columns that a terminal shows well, too."""
    cells = [[cell.strip().replace("|", "\\|") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(name: str, value: float | None) -> str:
    """A share in percent; the mistake severity is a height in the tree."""
    return f"{value:6.2f}" if name == "mistake_severity" and value is not None else percent(value)


def percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:6.2f} %"


def write_csv(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One row per rule, level and class; level means and overall scores have no class."""
    rows = [("decode", "level", "class", "score", "value")]
    for rule, result in results.items():
        rows += [(rule, level, name, "IoU", iou) for level, name, iou in per_class(result)]
        rows += [(rule, "", "", name, value) for name, value in summary(result).items()]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
