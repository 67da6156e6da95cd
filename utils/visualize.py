"""Label maps as pictures: overlays with a legend, and sheets of pictures under titles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.hierarchy import Hierarchy
from utils.images import VOID_COLOUR, write_indexed

LARGEST_JPEG = 65_500  # pixels a side


def palette(hierarchy: Hierarchy) -> np.ndarray:
    """Colour of every label value. Shape: (256, 3) uint8."""
    colours = np.full((256, 3), VOID_COLOUR, dtype=np.uint8)
    colours[: hierarchy.num_nodes] = hierarchy.colours
    return colours


def overlay(photo: np.ndarray, labels: np.ndarray, hierarchy: Hierarchy, strength: float = 0.6) -> np.ndarray:
    """The photo with the classes laid over it; background and void leave it as it is.

    Shape: (H, W, 3) uint8, (H, W) node ids -> (H, W, 3) uint8.
    """
    alpha = np.full((256, 1), round(256 * strength), dtype=np.uint16)
    alpha[[*hierarchy.background, hierarchy.ignore_index]] = 0
    added = palette(hierarchy) * alpha  # (256, 3)
    mixed = np.empty_like(photo)
    for row, seen, into in zip(labels, photo, mixed, strict=True):  # row by row: a photo may be large
        into[:] = (seen * (256 - alpha[row]) + added[row]) >> 8
    return mixed


def write_maps(folder: Path, name: str, photo: np.ndarray, leaves: np.ndarray, hierarchy: Hierarchy) -> None:
    """Writes <level>/<name>.png, a label map in the tree's colours, for each level, and overlay/<name>.jpg.

    The overlay has the photo's own size, but at most the side that a JPEG can have, over a legend of the colours that
    can be in it.
    Shape: (H, W, 3) uint8, (H, W) leaf ids. Raises: OSError.
    """
    for level, level_name in enumerate(hierarchy.level_names):
        path = folder / level_name / f"{name}.png"  # not with_suffix: a name may hold a dot
        path.parent.mkdir(parents=True, exist_ok=True)
        write_indexed(path, hierarchy.level_of(leaves, level), hierarchy.colours)
    path = folder / "overlay" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    coloured = [leaf for leaf in hierarchy.leaves if leaf not in hierarchy.background]
    captions = legend(hierarchy, max(photo.shape[1], 200), coloured)
    picture = Image.fromarray(stack([overlay(photo, leaves, hierarchy), captions]))
    picture.thumbnail((LARGEST_JPEG, LARGEST_JPEG))
    picture.save(path, quality=88)


def level_maps(labels: np.ndarray, hierarchy: Hierarchy, side: int) -> list[np.ndarray]:
    """The label map of each level in colour, its longer side at `side` pixels.

    Shape: (H, W) node ids -> L times (h, w, 3) uint8.
    """
    maps = [palette(hierarchy)[hierarchy.level_of(labels, level)] for level in range(hierarchy.num_levels)]
    return [thumbnail(level, side, Image.NEAREST) for level in maps]


def gallery(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], hierarchy: Hierarchy, side: int = 200
) -> np.ndarray:
    """Rows of pictures under titles, and a legend. Shape: (h, w, 3) uint8 each -> (h, w, 3) uint8."""
    cell, top = side + 4, 24
    sheet = Image.new("RGB", (cell * len(titles), top + cell * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((column * cell + 6, 4), title, fill="black", font=font)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            small = Image.fromarray(thumbnail(picture, side))
            sheet.paste(small, (x * cell + (cell - small.width) // 2, top + y * cell + (cell - small.height) // 2))
    return stack([np.array(sheet), legend(hierarchy, sheet.width)])


def legend(hierarchy: Hierarchy, width: int, nodes: Sequence[int] | None = None) -> np.ndarray:
    """Colour swatches with node names, in as many columns as `width` has room for. Shape: (h, width, 3) uint8."""
    nodes = range(hierarchy.num_nodes) if nodes is None else nodes
    unit = min(max(13, width // 60), 100)  # the height of the letters: a wide picture is looked at from further away
    font, line, box = ImageFont.load_default(unit), round(1.7 * unit), round(1.1 * unit)
    column = round(max(font.getlength(hierarchy.names[node]) for node in nodes)) + box + 2 * unit
    columns = max(1, width // column)
    picture = Image.new("RGB", (width, -(-len(nodes) // columns) * line), "white")
    draw = ImageDraw.Draw(picture)
    for i, node in enumerate(nodes):
        x, y = unit // 2 + i % columns * column, i // columns * line
        top = y + (line - box) // 2
        draw.rectangle((x, top, x + box, top + box), fill=hierarchy.colours[node], outline="black")
        draw.text((x + box + unit // 2, y + line // 2), hierarchy.names[node], fill="black", font=font, anchor="lm")
    return np.array(picture)


def stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of any width under each other, on white."""
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded, axis=0)


def thumbnail(picture: np.ndarray, side: int, resample: int = Image.BILINEAR) -> np.ndarray:
    """The picture with its longer side at `side` pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(picture).resize(size, resample))
