"""What the values of masks mean: the lines of a classes.txt, matched to the nodes of a tree by name."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.ids import read_text

if TYPE_CHECKING:
    from utils.hierarchy import Hierarchy

VOID = "void"
VOID_NAMES = {VOID, "ignore", "unlabelled", "unlabeled"}
BACKGROUND = VOID_NAMES | {"background", "bg", "backdrop", "nothing", "none"}
ALIASES = {"bg": "background"}
LARGEST = 65535
_VALUE = r"(?:\d+|#[0-9a-fA-F]{6}|\*)"
_PAIR = rf"\s*([^\s:,;][^:,;]*?)\s*[:=]\s*({_VALUE}(?:[\s,]+{_VALUE})*)\s*"


def read_classes(path: str | Path, names: Sequence[str]) -> dict[str, str]:
    """Value ("24"), colour ("#dc143c") or "*" (all others) -> name in the tree (`names`), or "void".

    A line is `24: person`, or `person: 24, 25, #dc143c` (several values for one class, several classes a line); or
    all lines are plain names that count from 0.

    Raises: UserError naming the line that has no known name, or repeats a value.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error
    order: dict[str, str] = {}
    plain = 0
    for line in filter(None, lines):
        if line.startswith("#"):  # a comment
            continue
        pairs = _pairs_of(line)
        if pairs is None:
            pairs, plain = [(line, [str(plain)])], plain + 1
        if plain and plain != len(order) + 1:
            raise UserError(f"{path}: {line!r} has no value, other lines have; write every line as 'value: name'")
        for text, values in pairs:
            name = _name_in_tree(text, names, f"{path}: {line!r}")
            for value in values:
                if value in order or (value.isdigit() and int(value) > LARGEST) or (plain and name in order.values()):
                    raise UserError(f"{path}: {line!r} repeats a value or a class, or the value is above {LARGEST}")
                order[value] = name
    if not order:
        raise UserError(f"{path} is empty; expected lines such as '0: background'")
    return order


def warnings_of(hierarchy: "Hierarchy", classes: Mapping[str, str] | None) -> list[str]:
    """What is allowed, but rarely meant: a background without its flag, a class that no mask can hold."""
    names, lonely = hierarchy.names, set(hierarchy.roots) & set(hierarchy.leaves)
    found = [
        f"the root '{names[root]}' of the tree '{hierarchy.name}' is scored like any class; if it is background, give "
        f'node {root} of the tree file "background": true'
        for root in sorted(lonely.difference(hierarchy.background))
        if names[root].lower() in BACKGROUND
    ]
    unused = [names[leaf] for leaf in hierarchy.leaves if names[leaf] not in (classes or {}).values()]
    if classes and unused:
        found.append(f"the class list has no value for {', '.join(unused)}")
    return found


def _pairs_of(line: str) -> list[tuple[str, list[str]]] | None:
    """(name, values) of a line, or None for a plain name."""
    match = re.fullmatch(rf"({_VALUE})\s*[:=,;\s]\s*(.*[^\d\s].*)", line)
    if match and not re.fullmatch(_VALUE, match[2]):
        return [(match[2], _values(match[1]))]
    if re.fullmatch(rf"{_PAIR}(?:[,;]{_PAIR})*[,;]?", line):
        return [(name, _values(values)) for name, values in re.findall(_PAIR, line)]
    return None


def _values(text: str) -> list[str]:
    return [str(int(value)) if value.isdigit() else value.lower() for value in re.findall(_VALUE, text)]


def _name_in_tree(text: str, names: Sequence[str], where: str) -> str:
    plain = {_plain(name): name for name in reversed(names)}
    name = _plain(text)
    for candidate in (name, name.removesuffix("s")):
        candidate = ALIASES.get(candidate, candidate)
        if candidate in plain:
            return plain[candidate]
        if candidate in VOID_NAMES:
            return VOID
    close = difflib.get_close_matches(name, [*names, *ALIASES], n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise UserError(f"{where} names no class of the tree{hint}; known names: {', '.join([*names, VOID])}")


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", "_", text.strip().lower())
