"""Masks as people have them -> labels of a tree: what their values mean, and grey, indexed, RGB PNG and .npy alike."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder, files_below, read_text, same_form
from utils.images import MASK_SUFFIXES, VOID_COLOUR, read_values

# What may follow the id in a mask's name; where an id has several, the first of these is its mask.
KINDS = "labelIds mask masks label labels seg segmentation gt labelTrainIds color instanceIds instanceTrainIds".split()
ENDING = re.compile(rf"(?:_gtFine|_gtCoarse)?_({'|'.join(KINDS)})$")

VOID = "void"
VOID_NAMES = {VOID, "ignore", "unlabelled", "unlabeled"}
BACKGROUND = VOID_NAMES | {"background", "bg", "backdrop", "nothing", "none"}
ALIASES = {"bg": "background"}
LARGEST = 65535
_VALUE = r"(?:\d+|#[0-9a-fA-F]{6}|\*)"


def find_masks(masks_dir: Path, photos: PhotoFolder, ending: str = "") -> dict[str, list[Path]]:
    """The masks of each id, sorted by id; `<id>_mask`, `<id>_gtFine_labelIds` and the like belong to `<id>`.

    `ending` is what follows the id where that is to be no guess.

    Raises: UserError where there is none.
    """
    found: dict[str, dict[int, list[Path]]] = {}
    for path in files_below(masks_dir, MASK_SUFFIXES):
        stem, rank = same_form(path.stem), 0
        match = None if ending or stem in photos else ENDING.search(stem)
        if match and stem[: match.start()] in photos:
            stem, rank = stem[: match.start()], 1 + KINDS.index(match[1])
        if stem.endswith(ending):
            found.setdefault(stem.removesuffix(ending), {}).setdefault(rank, []).append(path)
    if not found:
        raise UserError(f"{masks_dir} holds no mask; expected files that end in {ending}.png or {ending}.npy")
    return {sample_id: ranks[min(ranks)] for sample_id, ranks in sorted(found.items())}


# ---- classes.txt -------------------------------------------------------------------------------------------


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
    plain = 0  # lines without a value
    for line in lines:
        if not line or line.startswith("#"):  # a comment
            continue
        for text, values in _classes_of(line):
            name = _name_in_tree(text, names, f"{path}: {line!r}")
            is_repeated = not values and name in order.values()
            for value in values or [str(plain)]:
                if is_repeated or value in order or (value.isdigit() and int(value) > LARGEST):
                    raise UserError(f"{path}: {line!r} repeats a value or a class, or the value is above {LARGEST}")
                order[value] = name
            plain += not values
            if plain and plain != len(order):
                raise UserError(f"{path}: {line!r} has no value, other lines have; write every line as 'value: name'")
    if not order:
        raise UserError(f"{path} is empty; expected lines such as '0: background'")
    return order


def _classes_of(line: str) -> list[tuple[str, list[str]]]:
    """(name, values) of each class that a line names, values before names or after them; or a plain name."""
    line = re.sub(rf"^({_VALUE})\s+(?=\D)", r"\1:", line)  # '1 head'
    parts = list(filter(None, re.split(r"\s*[:=,;]\s*", line)))
    are_values = [bool(re.fullmatch(rf"{_VALUE}(\s+{_VALUE})*", part)) for part in parts]
    if not parts or all(are_values):
        return [(line, [])]
    found: list[tuple[str, list[str]]] = []
    for part, is_value in list(zip(parts, are_values, strict=True))[:: -1 if are_values[0] else 1]:
        if is_value:
            found[-1][1].extend(str(int(value)) if value.isdigit() else value.lower() for value in part.split())
        else:
            found.append((part, []))
    return found


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


def warnings_of(hierarchy: Hierarchy, classes: Mapping[str, str] | None) -> list[str]:
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


# ---- values and colours ------------------------------------------------------------------------------------


class MaskReader:
    """Reads masks into labels of one tree.

    `classes` says what in the tree a value ("24") or a colour ("#dc143c") stands for, "*" being all others; without
    it the values are the labels. `by` index or colour settles what the palette of an indexed PNG leaves open.
    """

    def __init__(self, hierarchy: Hierarchy, classes: Mapping[str, str] | None, by: str = "auto") -> None:
        self.tree, self.by, self.palette, self.void = hierarchy.name, by, hierarchy.colours, hierarchy.ignore_index
        label_of = {name: label for label, name in enumerate(hierarchy.names)} | {VOID: self.void}
        labels = {value: label_of[name] for value, name in (classes or {}).items()}
        self.rest = labels.get("*")  # the label of everything that is not named

        values = {int(key): label for key, label in labels.items() if key.isdigit()}
        are_ids = all(value == label for value, label in values.items())  # then so are those that no line names
        # A 255 that nothing explains is void in every family of masks.
        known = {v: v for v in (*range(hierarchy.num_nodes), self.void)} if are_ids else {255: self.void}
        self.values = known | values
        colours = {int(key[1:], 16): label for key, label in labels.items() if key[0] == "#"}
        ours = dict(zip(_packed(self.palette).tolist(), range(hierarchy.num_nodes), strict=True))
        self.colours = {int(_packed(VOID_COLOUR)): self.void} | ours | colours

    def read(self, path: Path) -> tuple[np.ndarray, bool]:
        """The labels of a mask, and whether its colours gave them against its values. Shape: (H, W) uint8.

        Raises: UserError for what cannot be read, a value or colour that stands for nothing, or an open order.
        """
        values, palette = read_values(path)
        if values.ndim == 3:
            return self._looked_up(_packed(values), self.colours, path, "the colour #{:06x}"), False
        if palette is not None and self.by != "index":
            coloured = {i: self.colours[c] for i, c in enumerate(_packed(palette).tolist()) if c in self.colours}
            present = [i for i, count in enumerate(Image.fromarray(values).histogram()) if count]
            differing = [i for i in present if i in coloured and coloured[i] != self.values.get(i, self.rest)]
            if self.by == "colour" or (differing and coloured.keys() >= {*present}):
                return self._looked_up(values, coloured, path, "the colour of index {}"), True
            if differing:
                raise UserError(
                    f"{path}: index {differing[0]} has the colour of label {coloured[differing[0]]} of the tree "
                    f"'{self.tree}', other colours are not the tree's: it is open whether its indices or its colours "
                    "count. Give --by index or --by colour"
                )
        return self._looked_up(values, self.values, path, "label {}"), False

    def _looked_up(self, codes: np.ndarray, meaning: Mapping[int, int], path: Path, what: str) -> np.ndarray:
        """Shape: (H, W) of numbers that stand for something -> (H, W) uint8."""
        table = np.full(max(*meaning, int(codes.max())) + 1, -1 if self.rest is None else self.rest, np.int16)
        table[list(meaning)] = list(meaning.values())
        labels = table[codes]
        if labels.min() < 0:
            row, column = np.argwhere(labels < 0)[0]
            raise UserError(
                f"{path}: {what.format(codes[row, column])} at row {row}, column {column} ({(labels < 0).sum()} pixels "
                f"have such) is not of the tree '{self.tree}' or its classes.txt; name it there, such as 'void: 255'"
            )
        return labels.astype(np.uint8)


def _packed(colours: Iterable) -> np.ndarray:
    """Shape: (..., 3) -> (...)."""
    return np.asarray(colours, np.uint32).reshape(*np.shape(colours)[:-1], 3) @ np.array([65536, 256, 1], np.uint32)
