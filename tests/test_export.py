"""tools/export.py: the exported program says what PyTorch says, for any batch and size."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import manage.predictor
from configs.config import DECODE_RULES, Config
from manage.checkpoint import checkpoint_digest, load_checkpoint, pack
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from manage.predictor import Predictor
from tests.factory import REPO
from tests.test_predict import noise, write_checkpoint
from tools import export
from utils.errors import UserError
from utils.files import read_json, write_json, write_whole
from utils.hierarchy import Hierarchy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tree) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("export") / "best.pt", tree, root_bias={"body": -0.5})


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


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
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_program_agrees_with_pytorch_for_any_batch_and_size(checkpoint, tmp_path, monkeypatch, capsys, ending):
    if not all(map(importlib.util.find_spec, export.PACKAGES[ending])):
        pytest.skip("needs onnx: pip install -r requirements-export.txt")
    path = tmp_path / f"model{ending}"
    run(monkeypatch, "--checkpoint", checkpoint, "--out", path, "--tta", "flip")
    assert "of PyTorch's" in capsys.readouterr().out
    assert json.loads((tmp_path / "model.json").read_text())["config"]["root_bias"] == {"body": -0.5}
    model, program = export.Exportable(Predictor.load(checkpoint, "cpu", tta="flip")), export.open_program(path)
    for shape in [(1, 3, 1, 1), (1, 3, 20, 45), (2, 3, 64, 64), (3, 3, 37, 91)]:
        (leaves, scores), (expected_leaves, expected_scores) = program(photos(shape)), model(photos(shape))
        assert leaves.shape == (shape[0], *shape[2:])
        assert (leaves == expected_leaves).float().mean() >= 0.999
        torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["small.pt", "small"])
def test_a_model_to_hand_on_holds_what_the_predictor_needs_and_a_card(checkpoint, tmp_path, monkeypatch, tree, name):
    if name == "small":
        pytest.importorskip("safetensors")
    path, options = tmp_path / name, ("--decode", "prob_sum", "--tta", "flip", "--licence", "cc-by-4.0")
    run(monkeypatch, "--checkpoint", checkpoint, "--out", path, *options)
    again = Predictor.load(path, "cpu")
    assert str(again) == f"{path}, decoded by prob_sum, tta flip"
    expected = Predictor.load(checkpoint, "cpu", decode="prob_sum", tta="flip")(noise(50, 37))
    close = {"atol": 0, "rtol": 0} if name == "small" else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(again(noise(50, 37)).logits, expected.logits, **close)
    card = next(tmp_path.rglob("README.md")).read_text()
    assert all(text in card for text in (*tree.names, "license: cc-by-4.0", "Not evaluated", "1 epochs"))


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
    run(monkeypatch, "--checkpoint", path, "--out", file)
    monkeypatch.setattr(manage.predictor, "SHIPPED", file)
    return file


def test_a_shipped_file_is_small_names_no_place_and_is_used_by_default(shipped, tmp_path, monkeypatch, capsys):
    state, best = load_checkpoint(shipped), tmp_path / "experiments/x/models_checkpoints/best.pt"
    assert {value.dtype for value in state["model"].values() if value.dim() > 1} == {torch.float16}
    assert "optimizer" not in state
    origin = {"experiment": "x", "checkpoint": "best.pt", "sha256": checkpoint_digest(best), "commit": "abc123"}
    assert state["origin"] == origin
    assert [state["config"][key] for key in ("encoder_weights", "device")] == ["w.pth", "auto"]
    assert str(tmp_path) not in json.dumps(state["config"])
    run(monkeypatch, "--out", tmp_path / "again.pt")
    assert f"exporting {shipped}, decoded by logit_sum with root_bias" in capsys.readouterr().out
    assert (tmp_path / "again.pt").read_bytes() == shipped.read_bytes(), "made of itself it is the same"


def test_a_shipped_file_is_scored_as_it_is_and_its_card_takes_these_scores(shipped, sample_data, tmp_path, monkeypatch):
    places = {"root_dir": str(tmp_path), "root_data_dir": str(sample_data), "device": "cpu", "num_workers": 0}
    config = Config(**places, exp_name="x", short_side=64)  # the file's own photo size is obeyed, 48
    for options in ({}, {"tta": "flip"}, {"limit": 2}):
        record = EvaluationManager(config, EvaluationOptions(str(shipped), pictures=False, **options)).run()
        assert record["config"]["short_side"] == 48
    run(monkeypatch, "--out", shipped, "--overwrite")
    card = shipped.with_name("README.md").read_text()
    assert "On 4 photos" in card
    assert " | logit_sum, tta off | logit_sum, tta flip |" in card
    record = read_json(tmp_path / "experiments/x/evaluation/x-shipped/scores.json")
    assert re.search(rf"\| mIoU1 +\| +{100 * record['scores']['mIoU1']:.2f} % \|", card)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.tflite", r"expected a name that ends in .pt2, .onnx or .pt, or a folder"),
        ("model.onnx", r"needs onnxscript: pip install -r requirements-export.txt"),
        ("model.pt2", r"model.pt2 exists already; choose another --out, or give --overwrite"),
        ("other.pt", r"README.md exists already"),
    ],
)
def test_mistakes_are_said_before_anything_is_exported(checkpoint, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    for there in ("model.pt2", "README.md"):
        (tmp_path / there).write_bytes(b"of an earlier export")
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path / name)
    assert (tmp_path / "model.pt2").read_bytes() == b"of an earlier export"
