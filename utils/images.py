"""Reads and writes the files of a data set: photos, label maps, id lists. Knows no tree."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_SUFFIXES = (".png", ".npy")

Colour = tuple[int, int, int]

_UNUSED_COLOUR = (224, 224, 192)  # what a label without a colour of its own (void) looks like
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_photo(path: str | Path, short_side: int | None = None) -> Image.Image:
    """The photo as upright RGB, whatever its mode on disk; `short_side` resizes it to that short side.

    Raises: UserError where the file is absent, damaged, too large to be a photo, or no picture at all.
    """
    try:
        with Image.open(path) as image:
            size = image.size if short_side is None else scaled_size(image.size, short_side)
            image.draft(None, size)  # a JPEG decodes up to 8 times smaller at no cost; never below `size`
            upright = _UPRIGHT.get(_orientation(image))
            photo = _to_rgb(image)
    except Exception as error:  # decoders raise nearly every type on damaged files
        raise _unreadable(path, "photo", error) from error
    if photo.size != size:
        photo = photo.resize(size, Image.Resampling.BILINEAR)
    if upright is not None:
        photo = photo.transpose(upright)
    return photo


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened picture, of any mode, as upright RGB; the picture itself is left as it is.

    Raises: ValueError for pixels without a known range (mode F).
    """
    upright = _UPRIGHT.get(_orientation(image))
    photo = _to_rgb(image)
    return photo if upright is None else photo.transpose(upright)


def photo_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright photo, read from its header alone.

    Raises: UserError as `read_photo` does.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # orientations 5 to 8 lie on their side
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except Exception as error:
        raise _unreadable(path, "photo", error) from error


def read_labels(path: str | Path) -> np.ndarray:
    """The label map of a .png (grey or palette, 8 bits, raw values) or a .npy (2-D integers).

    Shape: (H, W), uint8.
    Raises: UserError where the file is absent, damaged, or holds something other than one label a pixel.
    """
    path = Path(path)
    try:
        labels = _read_npy(path) if path.suffix.lower() == ".npy" else _read_png(path)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, "mask", error) from error
    return labels


def write_indexed(path: str | Path, labels: np.ndarray, palette: Sequence[Colour]) -> None:
    """Writes labels (H, W) uint8 as a palette PNG, one byte a pixel; the file appears whole or not at all.

    Raises: UserError where the folder cannot be written.
    """
    colours = [*palette, *[_UNUSED_COLOUR] * (256 - len(palette))]
    image = Image.fromarray(labels)
    # All 256 colours: with 16 or fewer PIL would pack 4 bits a pixel and cut larger labels (void) off.
    image.putpalette([channel for colour in colours for channel in colour])
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(partial, format="PNG", compress_level=3)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def find_file(folder: str | Path, sample_id: str, suffixes: Sequence[str]) -> Path:
    """The file of a sample: the first of `folder/id.suffix` that exists, in either case of the suffix.

    Raises: UserError naming the folder, the id and what was looked for.
    """
    folder = Path(folder)
    for suffix in suffixes:
        for name in (sample_id + suffix, sample_id + suffix.upper()):
            if (folder / name).is_file():
                return folder / name
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; looked there for the file of id '{sample_id}'")
    raise UserError(f"no file for id '{sample_id}' in {folder}; looked for {', '.join(suffixes)}")


def read_ids(path: str | Path) -> list[str]:
    """The ids of a list file, one a line, in order; a BOM, CRLF and blank lines are let pass.

    Raises: UserError naming the file and the line of an id that is repeated or that is no plain file name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the id file {path} does not exist; it should hold one photo id a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the id file {path} cannot be read as text: {error}") from error
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        sample_id = line.strip()
        if not sample_id:
            continue
        fault = id_fault(sample_id)
        if sample_id in line_of:
            fault = f"is already on line {line_of[sample_id]}; list each photo once"
        if fault:
            raise UserError(f"{path}, line {number}: id {sample_id!r} {fault}")
        line_of[sample_id] = number
    if not line_of:
        raise UserError(f"the id file {path} is empty; it should hold one photo id a line")
    return list(line_of)


def id_fault(sample_id: str) -> str | None:
    """What keeps a text from being an id, or None."""
    if sample_id.startswith(".") or any(character in sample_id for character in '/\\:\0"'):
        return "is not a plain name; an id has no folder, drive or leading dot in it"
    if len(sample_id.split()) > 1:
        return "has a space in it; write one id a line, without a second column"
    if not sample_id.isprintable():
        return "holds a character that cannot be printed"
    if len(sample_id.encode()) > 200:
        return "is too long to be a file's name; an id has at most 200 bytes"
    suffix = Path(sample_id).suffix.lower()
    if suffix in PHOTO_SUFFIXES + MASK_SUFFIXES:
        return f"ends in {suffix}; write ids without a suffix"
    return None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data does not make the pixels unusable
        return 1


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) scaled to that short side."""
    width, height = size
    scale = short_side / min(size)
    return (
        max(short_side, round(width * scale)),
        max(short_side, round(height * scale)),
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips it to white
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floats, which have no known range; save the photo with 8 bits a channel")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _read_png(path: Path) -> np.ndarray:
    with Image.open(path, formats=("PNG",)) as image:
        # A 2- or 4-bit grey PNG opens as mode L with its values stretched to 0..255: labels would change.
        stretched = image.mode == "L" and image.tile[0][3] != "L"
        if image.mode not in ("L", "P") or stretched:
            kind = "grey of fewer than 8 bits" if stretched else f"of mode {image.mode}"
            raise UserError(
                f"the mask {path} is {kind}; expected 8-bit grey or palette, each pixel holding its label id"
            )
        return np.array(image)


def _read_npy(path: Path) -> np.ndarray:
    labels = np.load(path, allow_pickle=False)
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.size == 0:
        raise UserError(f"the mask {path} has shape {getattr(labels, 'shape', None)}; expected (height, width)")
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"the mask {path} holds {labels.dtype}; expected integer label ids, e.g. labels.astype(np.uint8)"
        )
    low, high = labels.min(), labels.max()
    if low < 0 or high > 255:
        raise UserError(f"the mask {path} holds values from {low} to {high}; label ids lie in 0..255")
    return labels.astype(np.uint8)


def _unreadable(path: str | Path, what: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"the {what} {path} does not exist")
    return UserError(f"the {what} {path} cannot be read, it may be damaged: {error}")
