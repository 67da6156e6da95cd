"""Makes a tree file from a list of classes, picks colours that are easy to tell apart, and draws it.

    python tools/new_tree.py animals.txt                   # writes configs/hierarchies/animals.json and animals.png
    python tools/new_tree.py animals.csv --out data/animals/tree.json --levels parts,animals,all

LIST is a text with one class a line, each further in than its parent above it (a classes.txt is one, too; its values
are left out), or a .csv with the columns `name` and `parent`:

    background                 name,parent
    animal                     background,
      cat                      animal,
        cat_head               cat,animal
        cat_body               cat_head,cat

Leaves get the first ids, then their parents. Background is marked as such, left and right as mirrors.
"""

import argparse
import csv
import itertools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configs.config import REPOSITORY
from utils.cli import run_main
from utils.errors import UserError
from utils.files import write_whole
from utils.hierarchy import Hierarchy
from utils.ids import read_text
from utils.masks import VOID_NAMES, classes_of

BACKGROUND = ("background", "bg", "none")
Node = tuple[str, str | None, int | None]  # name, parent, value


def read_list(path: Path) -> list[Node]:
    """The classes in the order of the file. Raises: UserError naming the line."""
    lines = read_text(path, "the list of classes").splitlines()
    if path.suffix.lower() != ".csv":
        return indented(lines, path)
    rows = [(row["name"], row["parent"]) for row in csv.DictReader(lines) if {"name", "parent"} <= row.keys()]
    parent_of = {(name or "").strip(): (parent or "").strip() for name, parent in rows}
    if len(parent_of) < max(1, len(rows)) or not {*parent_of.values()} <= {"", *parent_of}:
        raise UserError(f"{path}: expected the columns name,parent, a line for each class, and one for each parent")
    return [(name, parent or None, None) for name, parent in parent_of.items()]


def indented(lines: list[str], path: Path) -> list[Node]:
    nodes, above = [], []  # above: (indent, name) from the root down
    for line, text in enumerate(lines, 1):
        text = re.sub(r"#(?![0-9a-fA-F]{6}\b).*", "", text).expandtabs(4).rstrip()  # a comment, no colour
        indent, left = len(text) - len(text.lstrip()), None
        name, values = classes_of(text.strip())[0]
        if not name or name.lower() in VOID_NAMES:
            continue
        while above and above[-1][0] >= indent:
            left = above.pop()[0]
        if left not in (None, indent):
            raise UserError(f"{path}, line {line}: {name!r} should be as far in as a line above it, say {left}")
        nodes.append(
            (name, above[-1][1] if above else None, int(values[0]) if values and values[0].isdigit() else None)
        )
        above.append((indent, name))
    return nodes


def colours(count: int) -> list[list[int]]:
    """Colours each as far as can be from all before it, from black and from white."""
    grid = np.array([*itertools.product(range(0, 256, 17), repeat=3)])
    weighted = grid * [0.55, 0.77, 0.33]  # an eye tells greens apart best, blues least
    chosen = [0, len(grid) - 1]
    while len(chosen) < count + 2:
        distance = np.linalg.norm(weighted[:, None] - weighted[chosen], axis=-1).min(1)
        chosen.append(int(distance.argmax()))
    return grid[chosen[2:]].tolist()


def make_tree(nodes: list[Node], name: str, levels: list[str] | None, source: str) -> Hierarchy:
    """Ids, colours, mirrors and level names for a list of classes. Raises: UserError where it is no tree."""
    parents = {node[1] for node in nodes}
    leaves = [node for node in nodes if node[0] not in parents]
    if {value for _, _, value in leaves} == set(range(len(leaves))):
        leaves.sort(key=lambda node: node[2])
    nodes = leaves + [node for node in nodes if node[0] in parents]
    ids = {None: None} | {node[0]: v for v, node in enumerate(nodes)}
    records = [{"id": v, "name": n, "parent": ids[parent]} for v, (n, parent, _) in enumerate(nodes)]
    for record, colour in zip(records, colours(len(nodes)), strict=True):
        is_background = record["name"].lower() in BACKGROUND and record["parent"] is None
        record |= {"colour": [0, 0, 0], "background": True} if is_background else {"colour": colour}
    depth, layer = 0, {None}
    while depth < len(nodes) and (layer := {name for name, parent, _ in nodes if parent in layer}):
        depth += 1
    levels = levels or ["leaves", *(f"level{i}" for i in range(2, depth)), "roots"][-depth:]
    tree = {"name": name, "ignore_index": 255 if len(nodes) <= 255 else 65535, "levels": levels, "nodes": records}
    for pair in Hierarchy.from_dict(tree, source).unpaired_sides():
        for one, other in (pair, pair[::-1]):
            records[ids[one]]["mirror"] = other
    return Hierarchy.from_dict(tree, source)


def draw(h: Hierarchy) -> Image.Image:
    """The tree from left to right, a class a line, in its colours."""
    line, step, font = 28, 150, ImageFont.load_default(15)
    picture = Image.new("RGB", (step * h.num_levels + 120, line * h.num_nodes + 12), "white")
    pen = ImageDraw.Draw(picture)
    spots = {v: (10 + step * (len(h.paths[v]) - 1), 6 + line * row) for row, v in enumerate(h.preorder)}
    for parent, child in h.edges:
        x, y = spots[parent][0] + 8, spots[child][1] + 12
        pen.line([(x, spots[parent][1] + 22), (x, y), (spots[child][0], y)], fill="grey")
    for v, (x, y) in spots.items():
        pen.rectangle((x, y + 3, x + 18, y + 21), fill=h.colours[v], outline="grey")
        pen.text((x + 26, y + 12), f"{h.names[v]}  {v}", fill="black", font=font, anchor="lm")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, metavar="LIST", help="the classes: indented text, or .csv")
    parser.add_argument("--out", type=Path, metavar="F", help="tree file (default: configs/hierarchies/<LIST>.json)")
    parser.add_argument("--levels", metavar="A,B", help="names of the levels, the leaves' first")
    args = parser.parse_args()
    out = args.out or REPOSITORY / "configs" / "hierarchies" / f"{args.list.stem}.json"
    picture, levels = out.with_suffix(".png"), args.levels and [level.strip() for level in args.levels.split(",")]
    if out.suffix != ".json" or (picture.exists() and not out.exists()):
        raise UserError(f"{out}: expected a name that ends in .json, beside which there is no {picture.name} yet")
    h = make_tree(read_list(args.list), args.list.stem, levels, str(args.list))
    tree = h.to_dict()
    nodes = ",\n".join("    " + json.dumps(node, ensure_ascii=False) for node in tree["nodes"])  # a node a line
    text = json.dumps(tree | {"nodes": []}, indent=2, ensure_ascii=False)[:-4] + f"[\n{nodes}\n  ]\n}}\n"
    if out.exists() and out.read_text(encoding="utf-8") != text:
        raise UserError(f"{out}: exists already and holds another tree; choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(text, out)
    draw(h).save(picture)
    for v in h.preorder:
        print(f"{'  ' * (len(h.paths[v]) - 1)}{h.names[v]} ({v})")
    note = "" if h.background else "; no root is named 'background', so every class counts in the means"
    print(f"{out}: {h.num_leaves} leaves, {h.num_nodes} classes, {h.num_levels} levels, drawn in {picture.name}{note}")


if __name__ == "__main__":
    run_main(main)
