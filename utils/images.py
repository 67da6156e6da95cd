"""Reads and writes the files of a data set: photos and label maps. Knows no tree."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError, is_out_of_memory
from utils.files import write_whole

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_SUFFIXES = (".png", ".npy")
SLIMMEST = 16  # the longer side is resized to at most so many times the short side that is asked for
VOID_COLOUR = (224, 224, 192)  # what a label without a colour of its own looks like
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> PIL's transposition that undoes it

Colour = tuple[int, int, int]
Size = tuple[int, int]  # width, height


@contextlib.contextmanager
def _named(path: str | Path, what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"the {what} {path} does not exist") from None
    except Exception as error:  # decoders raise nearly every type on damaged files
        if is_out_of_memory(error):
            raise
        raise UserError(f"the {what} {path} cannot be read, it may be damaged: {error}") from error


# ---- photos ------------------------------------------------------------------------------------------------


def read_photo(path: str | Path, short_side: int | None = None) -> Image.Image:
    """The photo as upright RGB, whatever its mode on disk; `short_side` resizes it, see `scaled_size`.

    Raises: UserError where the file is absent, damaged, too large to be a photo, or no picture at all.
    """
    with _named(path, "photo"), Image.open(path) as image:
        size = image.size if short_side is None else scaled_size(image.size, short_side)
        image.draft(None, size)  # a JPEG decodes up to 8 times smaller at no cost; never below `size`
        orientation = _orientation(image)
        photo = _to_rgb(image)
        return upright(photo if photo.size == size else photo.resize(size, Image.Resampling.BILINEAR), orientation)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened picture, of any mode, as upright RGB; the picture itself is left as it is.

    Raises: ValueError for pixels without a known range.
    """
    return upright(_to_rgb(image), _orientation(image))


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The stored pixels turned by their EXIF orientation."""
    if orientation == 1:
        return image
    turned = image.transpose(UPRIGHT[orientation])
    turned.info = {}  # it would say that the picture is still to be turned
    return turned


def photo_header(path: str | Path) -> tuple[Size, Size, int]:
    """Size as stored, size as seen, EXIF orientation, read without decoding. Raises: UserError as `read_photo` does."""
    with _named(path, "photo"), Image.open(path) as image:
        orientation = _orientation(image)
        return image.size, image.size[::-1] if orientation >= 5 else image.size, orientation  # 5 to 8 lie on their side


def scaled_size(size: Size, short_side: int) -> Size:
    """(width, height) at that short side; a slimmer photo than 1:16 at a long side of 16 times that.

    Otherwise a photo of 3000 x 1 pixels would have 77 million at a short side of 160.
    """
    scale = min(short_side / min(size), SLIMMEST * short_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _orientation(image: Image.Image) -> int:
    try:
        found = Image.Image.getexif(image).get(0x0112, 1)  # PNG's own method would decode the pixels
    except Exception:  # damaged EXIF data does not make the pixels unusable
        return 1
    return found if found in UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("pixels are floats, which have no known range; save the photo with 8 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips it to white
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


# ---- label maps --------------------------------------------------------------------------------------------


def read_labels(path: str | Path) -> np.ndarray:
    """The label ids of a .png (8-bit grey or palette) or a .npy (2-D integers). Shape: (H, W), uint8.

    Raises: UserError where the file is absent, damaged, or holds something other than one label a pixel.
    """
    values, _ = read_values(path)
    if values.ndim != 2 or values.dtype != np.uint8:
        raise UserError(f"the mask {path} holds colours or values above 255; expected a label id of 0 to 255 a pixel")
    return values


def read_values(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """What a mask holds as it is, and the palette of an indexed one.

    Shape: (H, W) or, for RGB, (H, W, 3), uint8 or, where it needs them, uint16; (colours, 3) uint8.
    Raises: UserError where the file is absent, damaged, or can be no mask.
    """
    with _named(path, "mask"):
        return _read_npy(path) if Path(path).suffix.lower() == ".npy" else _read_png(path)


def write_indexed(path: str | Path, labels: np.ndarray, palette: Sequence[Colour]) -> None:
    """Writes labels (H, W) uint8 as a palette PNG; the file appears whole or not at all. Raises: OSError."""
    write_whole(indexed_png(labels, palette), path)


def indexed_png(labels: np.ndarray, palette: Sequence[Colour]) -> bytes:
    """The bytes of a palette PNG. Shape: (H, W) uint8."""
    # All 256 colours: with 16 or fewer PIL would pack 4 bits a pixel and cut larger labels (void) off.
    colours = [*palette, *[VOID_COLOUR] * (256 - len(palette))]
    image = Image.fromarray(labels)
    image.putpalette([channel for colour in colours for channel in colour])
    image.save(file := io.BytesIO(), format="PNG", compress_level=3)
    return file.getvalue()


def _read_png(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    with Image.open(path, formats=("PNG",)) as image:
        stored = image.tile[0][3]  # such as "L;4": a grey of 4 bits opens stretched to 0..255, labels would change
        if stored == "RGBA" and image.getextrema()[3] == (255, 255):
            return np.array(image.convert("RGB")), None
        if stored not in ("L", "I;16B", "RGB") and image.mode != "P":
            raise UserError(
                f"the mask {path} is of mode {stored}; expected palette or grey of 8 bits, each pixel holding its "
                "label id, or RGB in the tree's colours"
            )
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if image.mode == "P" else None
        values = np.array(image)
        return values if stored != "I;16B" else _in_fewest_bytes(path, values), palette


def _read_npy(path: str | Path) -> tuple[np.ndarray, None]:
    values = np.load(path, allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "iu" or not values.size:
        raise UserError(f"the mask {path} holds no integer label ids of shape (height, width)")
    return _in_fewest_bytes(path, values), None


def _in_fewest_bytes(path: str | Path, values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"the mask {path} holds values from {values.min()} to {values.max()}; expected 0 to 65535")
    return values.astype(np.uint16 if values.max() > 255 else np.uint8)
