"""What reaches the network: an order that only the seed decides, however photos are read and kept."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from configs.config import load_config
from manage.data import TrainLoader, ValLoader
from tests.factory import TREE, VOID, make_data, write_config
from utils.dataset import EpochBatches, Files, Photos, keep_photos
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.memory import CPU


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("pipeline") / "data")


@pytest.fixture
def loader(data, tmp_path):
    """The loader of random views of a config with such keys, its photos kept as the config says."""

    def build(**keys):
        keys = {"color_jitter": 0.5, "rotation": 20.0, "short_side": 40} | keys
        config = load_config(write_config(tmp_path, data, **keys))
        loader = TrainLoader(config, Hierarchy.load(TREE))
        keep_photos({"train": loader.photos}, config.cache, CPU)
        loader.batches.start_at(1)
        return loader

    return build


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


@pytest.mark.parametrize("keys", [{"num_workers": 3}, {"cache": "off"}, {"cache": "memory", "num_workers": 3}], ids=str)
def test_views_do_not_depend_on_threads_or_cache(loader, keys):
    before = torch.get_rng_state()
    reference, other = loader(num_workers=0, cache="memory"), loader(**keys)
    first = list(reference)
    for again in (other, other, reference):
        assert_equal(first, list(again))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


@pytest.mark.parametrize(("cache", "times"), [("memory", 1), ("off", 3)])
def test_a_kept_photo_is_decoded_once_and_others_each_time(loader, monkeypatch, cache, times):
    train, counts, read = loader(cache=cache, num_workers=2), Counter(), Photos.__getitem__
    monkeypatch.setattr(Photos, "__getitem__", lambda photos, i: (counts.update([i]), read(photos, i))[1])
    for _ in range(3):
        list(train)
    assert dict(counts) == dict.fromkeys(range(8), times)


def test_validation_sees_whole_photos_with_native_labels(data, tmp_path, monkeypatch):
    monkeypatch.setattr("manage.distributed.rank", lambda: 1)
    monkeypatch.setattr("manage.distributed.world", lambda: 2)
    config = load_config(write_config(tmp_path, data, short_side=32))
    (sample,) = ValLoader(config, Hierarchy.load(TREE), ["p08", "p09", "p10"])
    assert sample.index == 1
    assert min(sample.image.shape[1:]) == 32
    assert sample.labels.shape == np.array(Image.open(data / "gt_masks/p09.png")).shape


def test_each_epoch_has_another_order_and_every_photo_once():
    batches, orders = EpochBatches(12, 3, seed=0), []
    for epoch in (0, 1):
        batches.start_at(epoch)
        orders.append([draw.index for batch in batches for draw in batch])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    with pytest.raises(UserError, match="lower batch_size"):
        EpochBatches(3, 4, seed=0)


@pytest.mark.parametrize(("share", "kept"), [(0.1, []), (2.0, ["train"]), (9.0, ["train", "val"])])
def test_auto_keeps_what_fits_train_first_and_says_so(data, tmp_path, monkeypatch, share, kept):
    config, tree = load_config(write_config(tmp_path, data)), Hierarchy.load(TREE)
    loaders = {"train": TrainLoader(config, tree), "val": ValLoader(config, tree, ["p08", "p09", "p10"])}
    splits = {name: loader.photos for name, loader in loaders.items()}
    size = splits["train"].size()
    assert size == sum(4 * np.prod(Image.open(data / f"JPEGImages/p0{i}.jpg").size) for i in range(8))
    monkeypatch.setattr("utils.dataset.free_memory", lambda: share * size + 0.1)
    said = keep_photos(splits, "auto", CPU)
    for name, photos in splits.items():
        assert (photos.keep == CPU) == (f"{name} in memory" in said) == (name in kept) != (f"{name} not" in said)
    for cache, message in (("memory", r"'cache': the train photos take .* are free"), ("device", "needs a GPU")):
        if share < 1:
            with pytest.raises(UserError, match=message):
                keep_photos(splits, cache, CPU)


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_photo_that_cannot_be_read_is_all_void_and_says_why(tmp_path, loader, cache):
    train = loader(cache=cache)
    train.photos.files[3] = Files(tmp_path / "gone.jpg", train.photos.files[3].labels)
    for _ in range(2):
        seen = [told for batch in train for told in zip(batch.index, batch.fault, batch.labels, strict=True)]
        ((index, fault, labels),) = [told for told in seen if told[1]]
        assert index == 3
        assert "gone.jpg does not exist" in fault
        assert (labels == VOID).all()


def test_labels_that_do_not_fit_their_photo_or_tree_are_named(tmp_path):
    files = Files(tmp_path / "a.png", tmp_path / "labels.png")
    Image.new("RGB", (40, 50)).save(files.photo)
    for size, value, fault in (((40, 49), 0, "40 x 49, its photo"), ((40, 50), 9, "label 9 is unknown")):
        Image.new("L", size, value).save(files.labels)
        assert fault in Photos([files], None, n_labels=9, void=VOID)[0].fault
