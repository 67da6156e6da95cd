"""Photos and label maps of every kind are read as what they stand for, or refused by name."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.images import photo_header, read_labels, read_photo, scaled_size, upright_rgb

RED = (200, 40, 40)
LABELS = np.array([[0, 1, 2], [6, 9, 255]], np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["L.jpg", "CMYK.jpg", "P.png", "RGB.png", "1.png"])
def test_every_mode_is_read_as_the_rgb_it_stands_for(tmp_path, kind):
    picture = Image.new("RGB", (40, 30), RED).convert(kind.split(".")[0])
    photo = read_photo(save(tmp_path / kind, picture))
    assert (photo.mode, photo.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(photo, int) - np.asarray(picture.convert("RGB"), int)).max() <= 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": picture.getpixel((0, 0))} if mode == "P" else {}
    assert read_photo(save(tmp_path / "a.png", picture, **options)).getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_keep_their_brightness(tmp_path):
    for value in (0, 128 * 256, 65535):
        photo = read_photo(save(tmp_path / "dark.png", Image.fromarray(np.full((4, 4), value, np.uint16))))
        assert photo.getpixel((1, 1)) == (value // 256,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_orientation_gives_the_upright_picture(tmp_path, orientation, suffix):
    upright = np.zeros((24, 48, 3), np.uint8)
    upright[:8, :16] = 255  # a mark at the top left
    stored = Image.fromarray(upright)
    if orientation > 1:  # the transposition that the camera did
        stored = stored.transpose({2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", stored, exif=exif, quality=95)
    assert photo_header(path) == (stored.size, (48, 24), orientation)
    with Image.open(path) as picture:
        for photo in (read_photo(path), upright_rgb(picture), upright_rgb(read_photo(path))):
            assert np.abs(np.asarray(photo, int) - upright).mean() < 5
        assert picture.size == stored.size, "left as it is"
    assert read_photo(path, 12).size == (24, 12)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_the_short_side_is_the_asked_one_unless_the_photo_is_slim(tmp_path, suffix):
    for size, scaled in (((500, 333), (96, 64)), ((97, 1000), (64, 660)), ((50, 60), (64, 77)), ((1, 3000), (1, 1024))):
        assert read_photo(save(tmp_path / f"a{suffix}", Image.new("RGB", size, RED)), 64).size == scaled
    assert scaled_size((10, 160), 480) == (480, 7680), "1:16 is no slimmer"


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_damaged_photo_is_named(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    save(path, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:2000] if content == "half" else content)
    for short_side in (None, 16):  # a JPEG is then decoded at a smaller scale
        with pytest.raises(UserError, match=rf"broken\{suffix} cannot be read, it may be damaged"):
            read_photo(path, short_side)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    """A file of a hundred bytes that promises ten gigabytes of pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (tmp_path / "bomb.png").write_bytes(png + struct.pack(">I", 4) + b"IDAT")
    for read in (read_photo, photo_header, read_labels):
        with pytest.raises(UserError, match=r"nothing\.png does not exist"):
            read(tmp_path / "nothing.png")
        with pytest.raises(UserError, match=r"bomb\.png .*decompression bomb"):
            read(tmp_path / "bomb.png")


NO_LABELS = {mode: Image.new(mode, (3, 2)) for mode in ("RGB", "1", "LA", "RGBA", "L")}
NO_LABELS |= {"floats": LABELS.astype(float), "3-D": LABELS[None], "booleans": LABELS > 1, "empty": LABELS[:0]}
NO_LABELS |= {"negative": LABELS.astype(int) - 1, "256": LABELS.astype(int) + 1, "pickled": np.array([[{}]], object)}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_holds_no_labels_is_refused_and_nothing_is_unpickled(tmp_path, kind):
    if isinstance(NO_LABELS[kind], np.ndarray):
        np.save(path := tmp_path / "odd.npy", NO_LABELS[kind], allow_pickle=True)
    else:
        path = save(tmp_path / "odd.png", NO_LABELS[kind], format="JPEG" if kind == "L" else "PNG")
    with pytest.raises(UserError, match=r"odd\."):
        read_labels(path)
