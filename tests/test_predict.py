"""From a checkpoint to label maps: the predictor, and tools/predict.py."""

import json
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


def pixels(photo: Image.Image) -> torch.Tensor:
    """Shape: (3, H, W) uint8."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tree) -> Path:
    """All that is needed: the tree's file is gone."""
    path = tmp_path_factory.mktemp("experiment") / "models_checkpoints" / "best.pt"
    return write_checkpoint(path, tree, hierarchy="gone.json")


@pytest.fixture(scope="module")
def predictor(checkpoint) -> Predictor:
    return Predictor.load(checkpoint, device="cpu")


# --- the predictor ---
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16"])
def test_a_photo_of_any_mode_is_predicted_and_left_as_it_is(predictor, mode):
    photo = Image.new(mode, (40, 34)) if mode in ("LAB", "I;16") else noise(40, 34).convert(mode)
    before = photo.tobytes()
    assert predictor(photo).leaves.shape == (34, 40)
    assert (photo.mode, photo.size, photo.tobytes()) == (mode, (40, 34), before)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (31, 33), (64, 32)])
def test_a_photo_of_any_size_is_predicted_at_its_size(predictor, size):
    result = predictor(noise(*size))
    assert [labels.shape for labels in result.levels] == [size[::-1]] * 3
    assert result.scores.shape == (10, *size[::-1])


def test_levels_follow_from_the_leaves_and_shares_from_both(predictor, tree):
    result = predictor(noise(70, 50))
    assert result.leaves.dtype == np.uint8
    assert len(np.unique(result.leaves)) > 1
    assert set(np.unique(result.leaves)) <= set(tree.leaves)
    for level, labels in enumerate(result.levels):
        assert np.array_equal(labels, tree.level_of(result.leaves, level))
        for node in tree.level_classes[level]:
            assert result.shares[tree.names[node]] == pytest.approx((labels == node).mean())
    assert sum(result.shares[tree.names[root]] for root in tree.roots) == pytest.approx(1)


def test_a_photo_on_its_side_is_predicted_upright(predictor, tmp_path):
    upright, exif = noise(60, 40), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    expected = predictor(upright).leaves
    with Image.open(tmp_path / "turned.png") as photo:
        assert np.array_equal(predictor(photo).leaves, expected)
    assert np.array_equal(predictor.predict_file(tmp_path / "turned.png").leaves, expected)


@pytest.mark.parametrize("size", [(300, 150), (60, 30), (400, 50), (2000, 50)])
def test_a_file_is_read_as_evaluation_reads_it_and_shown_at_its_own_size(tmp_path, tree, size):
    """A JPEG, which decodes smaller at once, so that reading and then resizing would give other pixels."""
    predictor = Predictor.load(write_checkpoint(tmp_path / "c.pt", tree, short_side=64), "cpu")
    noise(*size).save(tmp_path / "photo.jpg")
    logits = photo_logits(predictor.network, pixels(read_photo(tmp_path / "photo.jpg", 64)), size[::-1])
    result = predictor.predict_file(tmp_path / "photo.jpg")
    assert torch.equal(result.logits, logits[0])
    assert np.array_equal(result.leaves, DECODERS["logit_sum"](logits, tree)[0].numpy())
    assert np.array_equal(np.asarray(result.photo), np.asarray(read_photo(tmp_path / "photo.jpg")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "best"}, "'best' is no decoding rule; expected one of logit_sum"),
        ({"root_bias": {"torso": 1.0}}, "'torso' is not a root of the tree; its roots are background, body"),
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

    def call(*arguments, checkpoint: Path = checkpoint.parents[1]) -> int:
        words = [*arguments, "--checkpoint", checkpoint, "--device", "cpu", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
        return predict.main()

    return call


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_a_folder_is_predicted_with_all_folders_in_it(run, photos, tmp_path, predictor, capsys):
    noise(40, 34).save(photos / "b.tif")
    assert run(photos, "--scores") == 0
    assert "skipped in folders: 1 .txt, 1 hidden" in capsys.readouterr().out
    out = tmp_path / "out"
    assert [line["name"] for line in lines(out)] == ["a", "b", "deep/a"]
    expected = predictor(Image.open(photos / "a.png"))
    for level, folder in enumerate(predictor.hierarchy.level_names):
        assert np.array_equal(read_labels(out / folder / "a.png"), expected.levels[level])
    assert lines(out)[0]["shares"] == expected.shares
    assert read_labels(out / "parts" / "deep" / "a.png").shape == (40, 34)
    scores = np.load(out / "scores" / "a.npz")
    np.testing.assert_allclose(scores["scores"], expected.scores, atol=1e-3)
    assert list(scores["names"]) == list(predictor.hierarchy.names)
    with Image.open(out / "overlay" / "a.jpg") as overlay:
        assert overlay.height > 34  # the legend stands below


def test_an_unreadable_photo_is_named_and_the_rest_done(run, photos, tmp_path, capsys):
    (photos / "0.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert run(photos) == 1
    assert "0.jpg" in capsys.readouterr().err
    assert [line["name"] for line in lines(tmp_path / "out")] == ["a", "deep/a"]


def test_photos_that_differ_in_suffix_or_folder_alone_keep_apart(tmp_path):
    found = [tmp_path / "x" / "1.jpg", tmp_path / "x" / "1.png", tmp_path / "y" / "1.jpg"]
    assert predict.output_names(found) == ["x/1.jpg", "x/1.png", "y/1.jpg"]
    assert predict.output_names([found[0], found[2]]) == ["x/1", "y/1"]
    assert predict.output_names([found[0]]) == ["1"]


def test_earlier_predictions_are_neither_replaced_nor_predicted_again(run, photos, tmp_path):
    assert run(photos / "a.png") == 0
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        run(photos)
    assert run(photos / "**" / "a.*", photos, "--overwrite") == 0  # each once
    assert len(lines(tmp_path / "out")) == 2
    inside = predict.find_photos([str(tmp_path)], tmp_path / "out")  # the photos, and all that was just written
    assert inside == [photos / "a.png", photos / "deep" / "a.JPG"]
    with pytest.raises(UserError, match=r"absent.jpg: no such photo"):
        run(tmp_path / "absent.jpg")
