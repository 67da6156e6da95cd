"""Masks as people have them -> labels of a tree: what their values mean, and grey, indexed, RGB PNG and .npy alike."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import PhotoFolder, files_below, read_text, same_form
from utils.images import MASK_SUFFIXES, VOID_COLOUR, read_values

# What may follow the id in a mask's name; where an id has several, the first of these is its mask.
KINDS = "labelIds mask masks label labels seg segmentation gt labelTrainIds color instanceIds instanceTrainIds".split()
ENDING = re.compile(rf"(?:_gtFine|_gtCoarse)?_({'|'.join(KINDS)})$")

VOID = "void"
VOID_NAMES = {VOID, "ignore", "unlabelled", "unlabeled"}
VALUE = r"(?:\d+\b|#[0-9a-f]{6}\b|\*)"
VALUE_FIRST = re.compile(rf"({VALUE})[\s:=,;]+(\D.*)", re.IGNORECASE)  # 24: person
NAME_FIRST = re.compile(rf"([^:=,;]+?)\s*[:=]\s*((?:{VALUE}[\s,;]*)+)", re.IGNORECASE)  # person: 24, 25


def find_masks(masks_dir: Path, photos: PhotoFolder) -> dict[str, list[Path]]:
    """The masks of each id, sorted by id; `<id>_mask`, `<id>_gtFine_labelIds` and the like belong to `<id>`.

    Raises: UserError where there is none.
    """
    found: dict[str, dict[int, list[Path]]] = {}
    for path in files_below(masks_dir, MASK_SUFFIXES):
        stem, rank = same_form(path.stem), 0
        match = None if stem in photos else ENDING.search(stem)
        if match and stem[: match.start()] in photos:
            stem, rank = stem[: match.start()], 1 + KINDS.index(match[1])
        found.setdefault(stem, {}).setdefault(rank, []).append(path)
    if not found:
        raise UserError(f"{masks_dir} holds no mask; expected files that end in {' or '.join(MASK_SUFFIXES)}")
    return {sample_id: ranks[min(ranks)] for sample_id, ranks in sorted(found.items())}


# ---- classes.txt -------------------------------------------------------------------------------------------


def read_classes(path: str | Path, names: Sequence[str]) -> dict[str, str]:
    """Value ("24"), colour ("#dc143c") or "*" (all others) -> name in the tree (`names`), or "void".

    A line is `24: person`, or `person: 24, 25, #dc143c` (several values for one class, several classes a line).

    Raises: UserError naming the line that has no value or no known name, or repeats a value.
    """
    order: dict[str, str] = {}
    for line in filter(None, map(str.strip, read_text(path, "the class list").splitlines())):
        for text, values in classes_of(line) if line[0] != "#" else ():
            name = _name_in_tree(text, names, f"{path}: {line!r}")
            for value in values:
                value = str(int(value)) if value.isdigit() else value.lower()
                if value in order:
                    raise UserError(f"{path}: {line!r} repeats the value {value}")
                order[value] = name
            if not values:
                raise UserError(f"{path}: {line!r} has no value; write every line as 'name: value'")
    if not order:
        raise UserError(f"{path} is empty; expected lines such as 'background: 0'")
    return order


def classes_of(line: str) -> list[tuple[str, list[str]]]:
    """(name, values) of each class that a line names, values before the name or after it; or a plain name."""
    if match := VALUE_FIRST.fullmatch(line):
        return [(match[2], [match[1]])]
    if NAME_FIRST.search(line) and not NAME_FIRST.sub("", line):
        return [(name.strip(), re.findall(VALUE, values, re.IGNORECASE)) for name, values in NAME_FIRST.findall(line)]
    return [(line, [])]


def _name_in_tree(text: str, names: Sequence[str], where: str) -> str:
    plain = {_plain(name): name for name in reversed(names)} | {name: name for name in names}
    name = text if text in plain else "background" if _plain(text) == "bg" and "bg" not in plain else _plain(text)
    if name in plain or name in VOID_NAMES:
        return plain.get(name, VOID)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise UserError(f"{where} names no class of the tree{hint}; known names: {', '.join([*names, VOID])}")


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]+", "_", text.strip().lower())


# ---- values and colours ------------------------------------------------------------------------------------


class MaskReader:
    """Reads masks into labels of one tree.

    `classes` says what in the tree a value ("24") or a colour ("#dc143c") stands for, "*" being all others; without
    it the values are the labels.
    """

    def __init__(self, hierarchy: Hierarchy, classes: Mapping[str, str] | None) -> None:
        self.tree, void = hierarchy.name, hierarchy.ignore_index
        label_of = {name: label for label, name in enumerate(hierarchy.names)} | {VOID: void}
        labels = {value: label_of[name] for value, name in (classes or {}).items()}
        self.rest = labels.get("*")  # the label of everything that is not named

        values = {int(key): label for key, label in labels.items() if key.isdigit()}
        # where the values named are ids of the tree, so are those that no line names; but `*` names all
        are_ids = self.rest is None and all(value == label for value, label in values.items())
        # A 255 that nothing explains is void in every family of masks.
        self.values = ({v: v for v in (*range(hierarchy.num_nodes), void)} if are_ids else {255: void}) | values
        self.colours = {int(_packed(VOID_COLOUR)): void}
        self.colours |= zip(_packed(hierarchy.colours).tolist(), range(hierarchy.num_nodes), strict=True)
        self.colours |= {int(key[1:], 16): label for key, label in labels.items() if key[0] == "#"}

    def read(self, path: Path) -> np.ndarray:
        """The labels of a mask. Shape: (H, W) uint8.

        Raises: UserError for what cannot be read, a value or colour that stands for nothing, or an open order.
        """
        values, palette = read_values(path)
        if values.ndim == 3:
            return self._looked_up(_packed(values), self.colours, path, "the colour #{:06x}")
        for i in () if palette is None else np.flatnonzero(np.bincount(values.ravel())[: len(palette)]).tolist():
            coloured = self.colours.get(int(_packed(palette[i])))
            if coloured is not None and coloured != self.values.get(i, self.rest):
                raise UserError(
                    f"{path}: index {i} has the colour of label {coloured} of the tree '{self.tree}', so it is open "
                    "which of the two counts. Save the mask in grey (indices count) or as RGB (colours count)"
                )
        return self._looked_up(values, self.values, path, "label {}")

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
