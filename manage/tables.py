"""Scores as flat records, tables on screen and CSV."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from utils.hierarchy import Hierarchy


def summary(result: dict[str, Any]) -> dict[str, float | None]:
    """The scores that stand for a whole run: all that are one number, in [0, 1] but for `mistake_severity`."""
    names = [f"mIoU{level['level']}{end}" for end in ("", "_with_background") for level in result["levels"]]
    errors = [name for name in result if name.startswith("ECE_")]
    return {name: result[name] for name in [*names, "pixel_accuracy", "violation_rate", "mistake_severity", *errors]}


def per_class(result: dict[str, Any]) -> list[tuple[int, str, float | None]]:
    """(level, class, IoU) of every class at every level."""
    return [(level["level"], name, iou) for level in result["levels"] for name, iou in level["IoU"].items()]


def confusions(result: dict[str, Any]) -> list[tuple[list[str], np.ndarray]]:
    """(class names, counts) of each level."""
    return [(level["classes"], np.array(level["confusion"])) for level in result["levels"]]


def table(result: dict[str, Any], hierarchy: Hierarchy) -> str:
    """IoU per class and level in percent, as people read it."""
    background = {hierarchy.names[node] for node in hierarchy.background}
    lines = []
    for level in result["levels"]:
        lines.append(f"level {level['level']}: {level['name']}")
        for name, iou in level["IoU"].items():
            note = "  (not in the mean)" if name in background else "  (absent)" if iou is None else ""
            lines.append(f"    {name:<22}{percent(iou)}{note}")
        lines.append(f"    {'mIoU' + str(level['level']):<22}{percent(level['mIoU'])}")
        if background:
            lines.append(f"    {'with background':<22}{percent(level['mIoU_with_background'])}")
    lines.append(f"pixel accuracy            {percent(result['pixel_accuracy'])}")
    lines.append(f"violation rate            {percent(result['violation_rate'])}")
    lines.append(f"mistake severity          {shown('mistake_severity', result['mistake_severity'])}")
    for name in result:
        if name.startswith("ECE_"):
            lines.append(f"{'calibration error of ' + name[4:]:<26}{percent(result[name])}")
    return "\n".join(lines)


def rules_table(rules: dict[str, dict[str, float | None]]) -> str:
    """One row a decoding rule."""
    names = [name for name in next(iter(rules.values())) if "_with_background" not in name and "ECE_" not in name]
    lines = ["decoding".ljust(12) + "".join(name.rjust(18) for name in names)]
    for rule, scores in rules.items():
        lines.append(rule.ljust(12) + "".join(shown(name, scores[name]).rjust(18) for name in names))
    return "\n".join(lines)


def shown(name: str, value: float | None) -> str:
    """A share in percent; the mistake severity is a height in the tree."""
    return f"{value:6.2f}" if name == "mistake_severity" and value is not None else percent(value)


def percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:6.2f}"


def write_csv(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One row per rule, level and class; level means and overall scores have no class."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["decode", "level", "class", "score", "value"])
        for rule, result in results.items():
            for level, name, iou in per_class(result):
                writer.writerow([rule, level, name, "IoU", iou])
            for name, value in summary(result).items():
                writer.writerow([rule, "", "", name, value])
