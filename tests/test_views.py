"""Random views: the numbers of a view say all, and fast code shows what Pillow shows, slowly."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from utils.views import IMAGENET_MEAN, RandomViews, View

VOID, SIZE = 255, 64
MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


@pytest.fixture(scope="module")
def photo():
    """Blurred noise over blocks of labels, 90 x 120. Shape: (90, 120, 3), (90, 120) uint8."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    labels = generator.integers(0, 7, (9, 12), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    return np.array(noise.resize((120, 90), Image.Resampling.BICUBIC)), labels


def make(photos, views, **settings):
    """One batch of views of (photo, labels) pairs."""
    images = [torch.from_numpy(image).permute(2, 0, 1) for image, _ in photos]
    labels = [torch.from_numpy(map_) for _, map_ in photos]
    return RandomViews(SIZE, VOID, **settings).make(images, labels, views)


def by_pillow(photo, labels, view: View) -> tuple[np.ndarray, np.ndarray]:
    """The same view, step by step: window, resize, paste on an empty view, mirror, turn."""
    image, map_ = Image.fromarray(photo), Image.fromarray(labels)
    grow = view.side if view.angle else 0  # turned: a window three times as large, its middle taken at the end
    left, top, side, size = view.left - grow, view.top - grow, view.side + 2 * grow, SIZE * (3 if grow else 1)
    x0, x1 = max(0, left), min(image.width, left + side)
    y0, y1 = max(0, top), min(image.height, top + side)
    box = [round(value * size / side) for value in (x0 - left, y0 - top, x1 - left, y1 - top)]
    shape = (box[2] - box[0], box[3] - box[1])
    picture, seen = Image.new("RGB", (size, size), MEAN_COLOUR), Image.new("L", (size, size), VOID)
    picture.paste(image.crop((x0, y0, x1, y1)).resize(shape, Image.Resampling.BILINEAR), box[:2])
    seen.paste(map_.crop((x0, y0, x1, y1)).resize(shape, Image.Resampling.NEAREST), box[:2])
    if view.flip:
        picture, seen = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (picture, seen))
    if view.angle:
        picture = picture.rotate(view.angle, Image.Resampling.BILINEAR).crop((SIZE, SIZE, 2 * SIZE, 2 * SIZE))
        seen = seen.rotate(view.angle, Image.Resampling.NEAREST).crop((SIZE, SIZE, 2 * SIZE, 2 * SIZE))
    return np.array(picture), np.array(seen)


def inner(labels: np.ndarray, reach: int) -> np.ndarray:
    """Where no other label lies within `reach` pixels."""
    padded = np.pad(labels, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return (windows == labels[..., None, None]).all((-2, -1))


UPRIGHT = [
    View(10, 5, SIZE),  # as it is
    View(0, 0, 90),  # shrunk
    View(40, 30, 20, flip=True),  # enlarged
    View(-20, -35, 160),  # the whole photo inside
    View(-31, 50, 64, flip=True),  # over two edges
    View(119, 0, 90),  # one column of it
]


@pytest.mark.parametrize(
    "view", [*UPRIGHT, *(v._replace(angle=angle) for v in UPRIGHT[::2][:2] for angle in (30.0, -8.0, 180.0))], ids=str
)
def test_a_view_is_what_pillow_shows(photo, view):
    images, seen = make([photo], [view], rotation=180.0 if view.angle else 0.0)
    expected, labels = by_pillow(*photo, view)
    everywhere = np.ones_like(labels, bool)
    # turned, edges may fall otherwise
    inside = inner(labels == VOID, 3) & (labels != VOID) if view.angle else everywhere
    away = inner(labels, 2) if view.angle else everywhere
    assert min(inside.mean(), away.mean()) > 0.3
    assert np.abs(images[0].permute(1, 2, 0).numpy() - expected.astype(int))[inside].max() <= 2
    assert (seen[0].numpy() == labels)[away].all()


def test_a_view_does_not_depend_on_the_others_of_its_batch(photo):
    small = photo[0][:30, :50], photo[1][:30, :50]
    views = [View(3, 4, 80, True, 20.0, 1.1, 0.9, 1.2), View(-5, -10, 60, False, -3.0, 0.8, 1.1, 1.0)]
    together = make([photo, small], views, rotation=45.0)
    for i, pair in enumerate((photo, small)):
        alone = make([pair], [views[i]], rotation=45.0)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", ["Brightness", "Contrast", "Color"])
@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_colours_change_as_pillow_changes_them(photo, kind, factor):
    field = "saturation" if kind == "Color" else kind.lower()
    images, _ = make([photo], [View(0, 0, SIZE, **{field: factor})])
    expected = getattr(ImageEnhance, kind)(Image.fromarray(photo[0][:SIZE, :SIZE])).enhance(factor)
    assert np.abs(images[0].permute(1, 2, 0).numpy() - np.array(expected).astype(int)).max() <= 2


def test_a_seed_draws_the_same_view_and_the_settings_bound_it():
    views = RandomViews(SIZE, VOID, [0.5, 2.0], hflip=0.5, rotation=10.0, color_jitter=0.3)
    drawn = [views.draw(seed, 120, 90) for seed in range(200)]
    assert drawn == [views.draw(seed, 120, 90) for seed in range(200)]
    assert 60 < sum(view.flip for view in drawn) < 140
    assert {SIZE / 2 <= view.side <= 2 * SIZE for view in drawn} == {True}, "by a scale of 0.5 to 2"
    assert max(abs(view.angle) for view in drawn) <= 10
    assert all(0.7 <= factor <= 1.3 for view in drawn for factor in view[5:])
    assert RandomViews(SIZE, VOID).draw(5, 120, 90)[2:] == View(0, 0, SIZE)[2:], "no settings: a plain crop"
    for view in drawn:  # inside the photo where it is larger; else the photo inside the view
        for start, length in ((view.left, 120), (view.top, 90)):
            assert min(0, length - view.side) <= start <= max(0, length - view.side)
