"""What reaches the network: an order that only the seed decides, and views whose photo and labels fit."""

import numpy as np
import pytest
import torch
from PIL import Image

from configs.config import load_config
from manage.data import Tolerance, train_loader
from tests.factory import TREE, make_data, write_config
from utils.dataset import EpochBatches
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.transforms import MEAN_COLOUR, RandomView

VOID = 255


@pytest.fixture(scope="module")
def batches_of(tmp_path_factory):
    """All batches of the second epoch, loaded by some number of workers."""
    root = tmp_path_factory.mktemp("pipeline")
    data = make_data(root / "data")

    def load(workers: int, first: int = 0):
        config = load_config(write_config(root, data, num_workers=workers, color_jitter=0.5))
        loader, batches = train_loader(config, Hierarchy.load(TREE), 0, 1)
        batches.start_at(1, first)
        return list(loader)

    return load


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.labels, b.labels)


def test_photos_and_views_do_not_depend_on_the_number_of_workers(batches_of):
    assert_equal(batches_of(0), batches_of(2))


def test_an_epoch_can_begin_in_its_middle(batches_of):
    assert_equal(batches_of(0)[2:], batches_of(0, first=2))


def test_loading_leaves_the_global_generator_alone(batches_of):
    before = torch.get_rng_state()
    batches_of(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_epoch_has_another_order_and_every_photo_once():
    batches = EpochBatches(12, 3, seed=0)
    orders = []
    for epoch in (0, 1):
        batches.start_at(epoch)
        orders.append([draw.index for batch in batches for draw in batch])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))


def test_too_few_photos_for_a_step_are_refused():
    with pytest.raises(UserError, match="lower batch_size"):
        EpochBatches(3, 4, seed=0)


def view(**changes) -> RandomView:
    keys = {"size": 32, "short_side": None, "scale_jitter": None, "hflip": 0.0, "color_jitter": 0.0}
    return RandomView(**keys | {"void": VOID} | changes)


def blocks(height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """A photo that shows its labels: blocks of 16 pixels, red is 30 times the label."""
    labels = (np.arange(height)[:, None] // 16 * 3 + np.arange(width) // 16).astype(np.uint8) % 7
    photo = np.zeros((height, width, 3), np.uint8)
    photo[..., 0] = 30 * labels
    return Image.fromarray(photo), labels


@pytest.mark.parametrize("changes", [{}, {"scale_jitter": [2.0, 4.0]}, {"hflip": 1.0}])
def test_photo_and_labels_are_cut_turned_and_scaled_together(changes):
    photo, labels = blocks(80, 96)
    for seed in range(10):
        torch.manual_seed(seed)
        image, seen = view(**changes)(photo, labels)
        same = (image[0].float() - 30 * seen.float()).abs() < 15
        assert same.float().mean() > 0.85  # edges of blocks are blended in the photo, not in the labels


def test_what_lies_outside_the_photo_is_void_and_of_the_mean_colour():
    photo, labels = blocks(16, 16)
    image, seen = view()(photo, labels)
    outside = seen == VOID
    assert int(outside.sum()) == 32 * 32 - 16 * 16
    assert torch.equal(image[:, outside], torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None].expand(3, 768))


def test_short_side_scales_the_photo():
    photo, labels = blocks(64, 64)
    _, seen = view(short_side=32)(photo, labels)
    assert torch.equal(seen, torch.from_numpy(labels[1::2, 1::2]))


def test_bad_photos_are_counted_once_each_and_limited():
    tolerance = Tolerance(1, ["a", "b"])
    assert not tolerance.check(0, "damaged")
    assert not tolerance.check(0, "damaged")
    with pytest.raises(UserError, match=r"'b'.*skip_unreadable allows 1"):
        tolerance.check(1, "damaged")
