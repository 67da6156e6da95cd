"""tools/export.py: the exported program says what PyTorch says, for any batch and size."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import manage.predictor
from configs.config import DECODE_RULES
from manage.checkpoint import checkpoint_digest, load_checkpoint, pack
from manage.predictor import Predictor
from tests.factory import REPO
from tests.test_predict import noise, write_checkpoint
from tools import export, predict
from utils.errors import UserError
from utils.files import read_json, write_json, write_whole
from utils.hierarchy import Hierarchy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tree) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("export") / "best.pt", tree, root_bias={"body": -0.5})


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    return export.main()


def photos(shape: tuple[int, ...]) -> torch.Tensor:
    pictures = [np.array(noise(shape[3], shape[2], seed)) for seed in range(shape[0])]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(("rule", "tta"), [*((rule, "off") for rule in DECODE_RULES), ("mass", "full")])
def test_what_is_exported_predicts_as_the_predictor_does(tmp_path, rule, tta):
    tree = Hierarchy.load(REPO / "configs" / "hierarchies" / "cityscapes.json")
    path = write_checkpoint(tmp_path / "c.pt", tree, root_bias={"flat": 0.3}, decode=rule)
    predictor = Predictor.load(path, "cpu", tta=tta)
    leaves, scores = export.Exportable(predictor)(photos((2, 3, 37, 50)))
    for seed in range(2):
        expected = predictor(noise(50, 37, seed))
        assert np.mean(leaves[seed].numpy() == expected.leaves) >= 0.999
        np.testing.assert_allclose(scores[seed].numpy(), expected.scores, atol=1e-4)


@pytest.mark.slow
def test_torch_and_onnx_agree_with_pytorch_for_any_batch_and_size(
    checkpoint, sample_data, tmp_path, monkeypatch, capsys
):
    formats = ["torch", "onnx"] if all(map(importlib.util.find_spec, export.PACKAGES["onnx"])) else ["torch"]
    check = ("--format", ",".join(formats), "--tta", "flip", "--check", sample_data / "JPEGImages")
    assert run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path, *check) == 0
    assert capsys.readouterr().out.count("100.0000 % of the pixels of 10 photos") == len(formats)
    described = json.loads((tmp_path / "model.json").read_text())
    assert (described["config"]["root_bias"], described["tree"]["name"]) == ({"body": -0.5}, "pascal_part")
    model = export.Exportable(Predictor.load(checkpoint, "cpu", tta="flip"))
    for name in formats:
        program = export.open_program(tmp_path / f"model{export.FORMATS[name]}")
        for shape in [(1, 3, 1, 1), (1, 3, 20, 45), (2, 3, 64, 64), (3, 3, 37, 91)]:
            (leaves, scores), (expected_leaves, expected_scores) = program(photos(shape)), model(photos(shape))
            assert leaves.shape == (shape[0], *shape[2:])
            assert (leaves == expected_leaves).float().mean() >= 0.999
            torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_a_model_to_hand_on_holds_all_that_the_predictor_needs_and_a_card(
    checkpoint, tmp_path, monkeypatch, tree, kind
):
    if kind == "folder":
        pytest.importorskip("safetensors")
    path = tmp_path / "small" if kind == "folder" else tmp_path / "small.pt"
    options = ("--format", kind, "--name", "small", "--decode", "prob_sum", "--tta", "flip", "--licence", "cc-by-4.0")
    assert run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path, *options) == 0
    again = Predictor.load(path, "cpu")
    assert str(again) == f"{path}, decoded by prob_sum, tta flip"
    expected = Predictor.load(checkpoint, "cpu", decode="prob_sum", tta="flip")(noise(50, 37))
    close = {"atol": 0, "rtol": 0} if kind == "folder" else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(again(noise(50, 37)).logits, expected.logits, **close)
    card = next(tmp_path.rglob("README.md")).read_text()
    assert all(text in card for text in (*tree.names, "license: cc-by-4.0", "Not evaluated", "1 epochs"))
    with pytest.raises(UserError, match="holds files already"):
        run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path, *options)


def test_a_damaged_folder_is_named(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        Predictor.load(tmp_path, "cpu")


@pytest.fixture
def shipped(tmp_path, tree, monkeypatch) -> Path:
    """A tiny stand-in for the shipped model, made as that is made, from a checkpoint with all that a training saves."""
    places = {"root_dir": str(tmp_path), "encoder_weights": str(tmp_path / "w.pth"), "device": "cuda:7"}
    path = tmp_path / "experiments" / "x" / "models_checkpoints" / "best.pt"
    write_checkpoint(path, tree, exp_name="x", short_side=48, root_bias={"body": 0.5}, n_val_photos=1, **places)
    write_json([{"commit": "abc123"}], path.parents[1] / "environment.json")
    state = load_checkpoint(path)
    write_whole(pack(state | {"optimizer": {"state": torch.zeros(10**6)}, "ema": state["model"]}), path)
    file = tmp_path / "models" / "pretrained" / "shipped.pt"
    options = ("--out", file.parent, "--name", "shipped", "--format", "checkpoint")
    assert run(monkeypatch, "--checkpoint", path, *options) == 0
    monkeypatch.setattr(manage.predictor, "SHIPPED", file)
    return file


def test_a_shipped_file_is_the_network_alone_in_half_precision_and_names_no_place(shipped, tmp_path):
    state, best = load_checkpoint(shipped), tmp_path / "experiments/x/models_checkpoints/best.pt"
    assert {value.dtype for value in state["model"].values() if value.dim() > 1} == {torch.float16}
    assert {"optimizer"} & {*state} == set()
    assert state["origin"] == {
        "experiment": "x",
        "checkpoint": "best.pt",
        "sha256": checkpoint_digest(best),
        "commit": "abc123",
    }
    assert state["config"]["encoder_weights"] == "w.pth"
    assert (state["config"]["device"], state["config"]["n_val_photos"]) == ("auto", None)
    assert str(tmp_path) not in json.dumps(state["config"])
    assert {value.dtype for value in Predictor.load(shipped, "cpu").network.parameters()} == {torch.float32}


def test_without_a_checkpoint_the_shipped_model_is_used_and_named(shipped, tmp_path, monkeypatch, capsys):
    noise(90, 60).save(tmp_path / "photo.png")
    assert run(monkeypatch, "--out", tmp_path / "again", "--format", "checkpoint") == 0
    words = ["predict.py", tmp_path / "photo.png", "--out", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    assert predict.main() == 0
    assert capsys.readouterr().out.count(f"by {shipped}, decoded by logit_sum with root_bias") == 1
    assert (tmp_path / "again/model.pt").read_bytes() == shipped.read_bytes(), "made of itself it is the same"
    shipped.unlink()
    with pytest.raises(UserError, match=r"shipped.pt: the shipped model is not there; .*--checkpoint quickstart"):
        run(monkeypatch, "--out", tmp_path / "gone")


def test_a_shipped_file_is_scored_as_it_is_and_its_card_takes_these_scores(shipped, sample_data, tmp_path, monkeypatch):
    cfg = tmp_path / "mine.json"  # of other data and another network: the first is obeyed, the second is not
    places = {"root_dir": str(tmp_path), "root_data_dir": str(sample_data), "device": "cpu", "num_workers": 0}
    cfg.write_text(json.dumps(places | {"exp_name": "x", "short_side": 64, "encoder": "mobilenet_v2"}))
    for options in ([], ["--tta", "flip"], ["--limit", "2"]):
        words = ["evaluate.py", "--cfg", cfg, "--checkpoint", shipped, "--no-pictures", *options]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        assert evaluate.main() == 0
    options = ("--out", shipped.parent, "--name", "shipped", "--format", "checkpoint", "--overwrite")
    assert run(monkeypatch, *options) == 0
    record = read_json(tmp_path / "experiments/x/evaluation/x-shipped/scores.json")
    assert record["checkpoint_sha256"] == checkpoint_digest(shipped)
    assert (record["photos"], record["config"]["short_side"]) == (4, 48)
    card = shipped.with_name("README.md").read_text()
    assert "On 4 photos" in card
    assert "|  | logit_sum, tta off | logit_sum, tta flip |" in card
    assert f"| mIoU1 | {100 * record['scores']['mIoU1']:.2f} % |" in card


def test_a_program_that_says_something_else_is_found_out(checkpoint, sample_data):
    predictor, photo = Predictor.load(checkpoint, "cpu"), next((sample_data / "JPEGImages").iterdir())
    wrong = export.agreement(lambda x: [torch.full((1, *x.shape[2:]), 254)], predictor, [photo])
    assert wrong == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "tflite"), "'tflite' is not one of torch, onnx, checkpoint, folder"),
        (("--format", "onnx"), r"--format onnx needs onnxscript: pip install -r requirements-export.txt"),
        (("--format", "torch"), r"holds files already; choose another --out, or give --overwrite"),
        (("--format", "torch", "--overwrite", "--check", "nowhere"), "no such photo or folder"),
    ],
)
def test_mistakes_are_said_before_anything_is_exported(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    (tmp_path / "model.pt2").write_bytes(b"of an earlier export")
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path, *arguments)
    assert (tmp_path / "model.pt2").read_bytes() == b"of an earlier export"
