"""Label maps as pictures: overlays, and panels of a photo with truth and prediction at every level."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.hierarchy import Hierarchy

VOID_COLOUR = (128, 128, 128)


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


def captioned_overlay(photo: np.ndarray, leaves: np.ndarray, hierarchy: Hierarchy, largest: int = 4096) -> np.ndarray:
    """The overlay, at most `largest` pixels a side, over a legend of the colours that can be in it.

    Shape: (h, w, 3) uint8 of any size, (H, W) node ids -> (about H, about W, 3) uint8.
    """
    picture = overlay(_sized(photo, leaves.shape), leaves, hierarchy)
    if max(leaves.shape) > largest:
        picture = thumbnail(picture, largest)
    coloured = [leaf for leaf in hierarchy.leaves if leaf not in hierarchy.background]
    return stack([picture, legend(hierarchy, max(picture.shape[1], 200), coloured)])


def board(
    photo: np.ndarray, truth: np.ndarray, leaves: np.ndarray, hierarchy: Hierarchy, side: int = 240
) -> np.ndarray:
    """Photo and overlay, and truth over prediction in a column a level, with titles and a legend.

    Shape: (h, w, 3) uint8, (H, W), (H, W) -> (about 2 side, (1 + L) side, 3) uint8.
    """
    photo = _sized(photo, leaves.shape)
    rows = []
    for what, first, labels in (("truth", photo, truth), ("predicted", overlay(photo, leaves, hierarchy), leaves)):
        cells = [first, *level_maps(labels, hierarchy, side)]
        titles = ["photo" if what == "truth" else "overlay", *(f"{name}: {what}" for name in hierarchy.level_names)]
        rows += [_titles(titles, side), _row(cells, side)]
    return stack([*rows, legend(hierarchy, rows[0].shape[1])])


def gallery(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], hierarchy: Hierarchy, side: int = 200
) -> np.ndarray:
    """Rows of pictures under titles, and a legend. Shape: (h, w, 3) uint8 each -> (h, w, 3) uint8."""
    framed = [_row(cells, side) for cells in rows]
    coloured = [leaf for leaf in hierarchy.leaves if leaf not in hierarchy.background]
    return stack([_titles(titles, side), *framed, legend(hierarchy, framed[0].shape[1], coloured)])


def level_maps(labels: np.ndarray, hierarchy: Hierarchy, side: int) -> list[np.ndarray]:
    """The label map of each level in colour, its longer side at `side` pixels.

    Shape: (H, W) node ids -> L times (h, w, 3) uint8.
    """
    maps = [palette(hierarchy)[hierarchy.level_of(labels, level)] for level in range(hierarchy.num_levels)]
    return [thumbnail(level, side, Image.NEAREST) for level in maps]


def _titles(titles: Sequence[str], side: int) -> np.ndarray:
    """A row of titles over a row of framed cells."""
    row = Image.new("RGB", ((side + 4) * len(titles), 24), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((column * (side + 4) + 6, 4), title, fill="black", font=font)
    return np.array(row)


def legend(hierarchy: Hierarchy, width: int, nodes: Sequence[int] | None = None) -> np.ndarray:
    """Colour swatches with node names, in as many rows as `width` asks for. Shape: (h, width, 3) uint8."""
    nodes = range(hierarchy.num_nodes) if nodes is None else nodes
    unit = max(13, width // 60)  # the height of the letters: a wide picture is looked at from further away
    font, line, margin, box = ImageFont.load_default(unit), round(1.7 * unit), unit // 2, round(1.1 * unit)
    x, y, places = margin, 0, []
    for node in nodes:
        length = box + unit // 2 + font.getlength(hierarchy.names[node])
        if x + length > width and x > margin:
            x, y = margin, y + line
        places.append((node, x, y))
        x += round(length) + unit
    picture = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(picture)
    for node, x, y in places:
        top = y + (line - box) // 2
        draw.rectangle((x, top, x + box, top + box), fill=hierarchy.colours[node], outline="black")
        place = (x + box + unit // 2, y + line // 2)
        draw.text(place, hierarchy.names[node], fill="black", font=font, anchor="lm")
    return np.array(picture)


def confusion_picture(matrix: np.ndarray, names: Sequence[str], cell: int = 44) -> np.ndarray:
    """A confusion matrix, each row (a true class) in percent of its pixels. Shape: (K, K) -> (h, w, 3) uint8."""
    font, note = ImageFont.load_default(12), "rows: truth, columns: prediction, % of the row"
    longest = int(max(font.getlength(name) for name in names))
    left, top = longest + 14, longest + 40
    width = max(left + cell * len(names), int(font.getlength(note)) + 6) + 8
    picture = Image.new("RGB", (width, top + cell * len(names) + 6), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((6, 4), note, fill="black", font=font)
    for number, name in enumerate(names):
        middle = number * cell + cell // 2
        draw.text((left - 6, top + middle), name, fill="black", font=font, anchor="rm")
        upwards = _upwards(name, font)
        picture.paste(upwards, (left + middle - upwards.width // 2, top - 4 - upwards.height))
    for (row, column), share in np.ndenumerate(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)):
        x, y = left + column * cell, top + row * cell
        shade = (int(255 - 205 * share), int(255 - 140 * share), 255)
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
        ink, middle = "white" if share > 0.6 else "black", cell // 2 - 1
        draw.text((x + middle, y + middle), f"{100 * share:.0f}", fill=ink, font=font, anchor="mm")
    return np.array(picture)


def _upwards(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Text that reads from bottom to top."""
    picture = Image.new("RGB", (int(font.getlength(text)) + 1, 16), "white")
    ImageDraw.Draw(picture).text((0, 8), text, fill="black", font=font, anchor="lm")
    return picture.transpose(Image.Transpose.ROTATE_90)


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


def _sized(photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The photo at the size (height, width) of its label map."""
    if photo.shape[:2] == size:
        return photo
    return np.array(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR))


def _row(cells: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Pictures beside each other, each with its longer side at `side` pixels, in a white square."""
    squares = []
    for cell in cells:
        cell = thumbnail(cell, side)
        square = np.full((side + 4, side + 4, 3), 255, dtype=np.uint8)
        top, left = (side + 4 - cell.shape[0]) // 2, (side + 4 - cell.shape[1]) // 2
        square[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
        squares.append(square)
    return np.concatenate(squares, axis=1)
