"""Masks as people have them -> labels of a tree: grey, indexed or colour-coded PNG and .npy, in any order of values."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.ids import PhotoFolder, files_below, same_form
from utils.images import MASK_SUFFIXES, VOID_COLOUR, Colour, read_values

UNKNOWN = -1
# What may follow the id in a mask's name; where an id has several, the first of these is its mask.
KINDS = "labelIds mask masks label labels seg segmentation gt labelTrainIds color instanceIds instanceTrainIds".split()
ENDING = re.compile(rf"(?:_gtFine|_gtCoarse)?_({'|'.join(KINDS)})$")


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


@dataclass(frozen=True)
class MaskReader:
    """Reads masks into labels of one tree.

    `classes` says which label a value ("24") or a colour ("#dc143c") stands for, "*" being all others; without it
    the values are the labels. `by` index or colour settles what the palette of an indexed PNG leaves open.
    """

    tree: str
    labels: tuple[int, ...]  # all that may stand in a label map
    void: int
    palette: tuple[Colour, ...]
    classes: dict[str, int] | None = None
    by: str = "auto"
    colours: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        colours = {_packed(colour): label for label, colour in enumerate(self.palette)}
        named = {int(key[1:], 16): label for key, label in (self.classes or {}).items() if key[0] == "#"}
        object.__setattr__(self, "colours", {_packed(VOID_COLOUR): self.void} | colours | named)

    def read(self, path: Path) -> tuple[np.ndarray, bool]:
        """The labels of a mask, and whether its colours gave them against its values. Shape: (H, W) uint8.

        Raises: UserError for what cannot be read, a value or colour that stands for nothing, or an open order.
        """
        values, palette = read_values(path)
        if values.ndim == 3:
            return self._by_colour(values, path), False
        counts = np.array(
            Image.fromarray(values).histogram() if values.dtype == np.uint8 else np.bincount(values.ravel())
        )
        present = np.flatnonzero(counts)
        table = self._table(len(counts))
        if palette is not None and self.by != "index":
            coloured = np.full(len(counts), UNKNOWN)
            shown = [self.colours.get(_packed(colour), UNKNOWN) for colour in palette.tolist()]
            coloured[: len(shown)] = shown
            seen = coloured[present]
            known, differs = (seen >= 0).all(), ((seen >= 0) & (seen != table[present])).any()
            if (known and differs) or self.by == "colour":
                return self._looked_up(values, coloured, present, counts, path, "the colour of label"), True
            if differs:
                raise UserError(self._open_order(path, present, seen, table))
        return self._looked_up(values, table, present, counts, path, "label"), False

    def _table(self, size: int) -> np.ndarray:
        """Value -> label. A 255 that nothing explains is void in every family of masks."""
        classes = self.classes or {}
        named = {int(key): label for key, label in classes.items() if key.isdigit()}
        are_ids = all(value == label for value, label in named.items())  # then so are those that no line names
        known = dict(zip(self.labels, self.labels, strict=True)) if are_ids else {255: self.void}
        table = np.full(size, classes.get("*", UNKNOWN))
        for value, label in (known | named).items():
            if value < size:
                table[value] = label
        return table

    def _looked_up(self, values, table, present, counts, path: Path, what: str) -> np.ndarray:
        if unknown := [int(value) for value in present if table[value] == UNKNOWN]:
            row, column = np.argwhere(values == unknown[0])[0]
            raise UserError(
                f"{path}: {what} {unknown[0]} at row {row}, column {column} ({counts[unknown[0]]} pixels) "
                f"{'is no label of the tree' if self.classes is None else 'is not in classes.txt of the tree'} "
                f"'{self.tree}'" + (f"; nor are {unknown[1:]}" if unknown[1:] else "")
            )
        same = values.dtype == np.uint8 and (table[present] == present).all()
        return values if same else table.astype(np.uint8)[values]

    def _by_colour(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Shape: (H, W, 3) uint8 -> (H, W) uint8."""
        packed = values.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
        keys = np.array(sorted(self.colours), np.uint32)
        place = np.searchsorted(keys, packed).clip(0, len(keys) - 1)
        table = np.array([self.colours[int(key)] for key in keys], np.uint8)
        labels, strange = table[place], keys[place] != packed
        rest = (self.classes or {}).get("*")
        if strange.any() and rest is None:
            row, column = np.argwhere(strange)[0]
            raise UserError(
                f"{path}: the colour #{packed[row, column]:06x} at row {row}, column {column} ({strange.sum()} pixels "
                f"have such) is no colour of the tree '{self.tree}'; name it in classes.txt, such as 'void: #000000'"
            )
        return np.where(strange, rest, labels).astype(np.uint8) if strange.any() else labels

    def _open_order(self, path: Path, present, seen, table) -> str:
        value = next(i for i, v in enumerate(present) if seen[i] >= 0 and seen[i] != table[v])
        return (
            f"{path}: index {present[value]} has the colour of label {seen[value]} of the tree '{self.tree}', other "
            "colours are not the tree's: it is open whether its indices or its colours count. Give --by index or "
            "--by colour"
        )


def _packed(colour) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue
