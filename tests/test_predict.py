"""From a checkpoint to label maps: the predictor, and tools/predict.py."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.config import config_from_dict
from manage.checkpoint import pack
from manage.predictor import Predictor
from models.hseg import HSEG
from tests.test_inference import photo_logits
from tools import predict
from utils.decode import DECODERS
from utils.errors import UserError
from utils.files import write_whole
from utils.images import read_labels, read_photo

SLIM = [8, 8, 8, 8, 8]


def write_checkpoint(path: Path, tree, bias: float | list[float] = 0.0, **keys) -> Path:
    """A checkpoint of a network with random weights whose predictions vary from pixel to pixel; `bias` of each node."""
    config = config_from_dict({"pretrained": False, "decoder_channels": SLIM} | keys, "test")
    torch.manual_seed(0)
    network = HSEG(config.encoder, tree.num_nodes, decoder_channels=config.decoder_channels)
    network.segmentation_head.weight.data.mul_(5)
    network.segmentation_head.bias.data[:] = torch.tensor(bias)
    state = {"model": network.state_dict(), "ema": None, "config": config.to_dict(), "tree": tree.to_dict(), "epoch": 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(pack(state), path)
    return path


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tree) -> Path:
    """All that is needed: the tree's file is gone."""
    path = tmp_path_factory.mktemp("experiment") / "models_checkpoints" / "best.pt"
    return write_checkpoint(path, tree, hierarchy="gone.json")


@pytest.fixture(scope="module")
def predictor(checkpoint) -> Predictor:
    return Predictor.load(checkpoint, device="cpu")


# --- the predictor ---
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (70, 50)])
def test_a_photo_of_any_size_is_predicted_at_its_size_and_levels_and_shares_follow_from_leaves(predictor, tree, size):
    result = predictor(noise(*size))
    assert result.scores.shape == (10, *size[::-1])
    assert set(np.unique(result.leaves)) <= set(tree.leaves)
    for level, labels in enumerate(result.levels):
        assert np.array_equal(labels, tree.level_of(result.leaves, level))
        for node in tree.level_classes[level]:
            assert result.shares[tree.names[node]] == pytest.approx((labels == node).mean())


@pytest.mark.parametrize("size", [(300, 150), (60, 30), (2000, 50)])
def test_a_file_is_read_upright_as_evaluation_reads_it_and_shown_at_its_own_size(tmp_path, tree, size):
    """A JPEG, which decodes smaller at once, so that reading and then resizing would give other pixels."""
    predictor, exif = Predictor.load(write_checkpoint(tmp_path / "c.pt", tree, short_side=64), "cpu"), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    noise(*size).save(tmp_path / "photo.jpg", exif=exif)
    fed = torch.from_numpy(np.array(read_photo(tmp_path / "photo.jpg", 64))).permute(2, 0, 1).contiguous()
    logits = photo_logits(predictor.network, fed, size)
    result = predictor.predict_file(tmp_path / "photo.jpg")
    assert torch.equal(result.logits, logits[0])
    assert np.array_equal(result.leaves, DECODERS["logit_sum"](logits, tree)[0].numpy())
    assert result.photo.size == size[::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "best"}, "'best' is no decoding rule; expected one of logit_sum"),
        ({"root_bias": {"torso": 1.0}}, "'torso' is no root of the tree; its roots are background, body"),
        ({"tta": "both"}, "tta 'both': expected one of off, flip, full"),
        ({"tile": 8}, "tile 8: expected at least 256"),
    ],
)
def test_an_option_that_cannot_be_is_refused(checkpoint, options, message):
    with pytest.raises(UserError, match=message):
        Predictor.load(checkpoint, "cpu", **options)


# --- tools/predict.py ---
@pytest.fixture
def photos(tmp_path) -> Path:
    """Two photos of one name in two folders, one inside the other."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    noise(40, 34).save(folder / "a.png")
    noise(34, 40, seed=1).save(folder / "deep" / "a.JPG")
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def run(monkeypatch, checkpoint, tmp_path):
    """Calls the tool; returns its exit status."""

    def call(*arguments) -> int:
        words = [*arguments, "--checkpoint", checkpoint.parents[1], "--device", "cpu", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
        return predict.main()

    return call


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_a_folder_is_predicted_with_those_in_it_and_what_is_damaged_is_named(run, photos, tmp_path, predictor, capsys):
    noise(40, 34).save(photos / "a.tif")
    (photos / "0.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert run(photos, "--scores") == 1
    said = capsys.readouterr()
    assert "skipped in folders: 1 .txt, 1 hidden" in said.out
    assert "0.jpg" in said.err
    out = tmp_path / "out"
    assert [line["name"] for line in lines(out)] == ["a.png", "a.tif", "deep/a.JPG"]  # two differ in nothing else
    expected = predictor(Image.open(photos / "a.png"))
    for level, folder in enumerate(predictor.hierarchy.level_names):
        assert np.array_equal(read_labels(out / folder / "a.png.png"), expected.levels[level])
    assert lines(out)[0]["shares"] == expected.shares
    scores = np.load(out / "scores" / "a.png.npz")
    np.testing.assert_allclose(scores["scores"], expected.scores, atol=1e-3)
    assert list(scores["names"]) == list(predictor.hierarchy.names)


def test_earlier_predictions_are_neither_replaced_nor_predicted_again(run, photos, tmp_path):
    assert run(photos / "a.png") == 0
    with pytest.raises(UserError, match=r"out is not empty; .*--overwrite"):
        run(photos)
    (photos / ".thumbs").mkdir()
    shutil.copy(photos / "a.png", photos / ".thumbs")
    shutil.copytree(tmp_path / "out", tmp_path / "earlier")
    assert run(photos / "**" / "a.*", tmp_path, "--overwrite") == 0  # each once, and nothing of what was just written
    assert [line["name"] for line in lines(tmp_path / "out")] == ["a", "deep/a"]
    with pytest.raises(UserError, match=r"absent.jpg: no such photo"):
        run(tmp_path / "absent.jpg")
