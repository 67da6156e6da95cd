"""tools/export.py: the exported program says what PyTorch says, for any batch and size."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.config import DECODE_RULES
from manage.checkpoint import checkpoint_digest
from manage.predictor import Predictor
from tests.test_predict import noise, write_checkpoint
from tools import export
from utils.errors import UserError
from utils.files import write_json
from utils.hierarchy import Hierarchy

SIZES = [(1, 3, 1, 1), (1, 3, 20, 45), (2, 3, 64, 64), (3, 3, 37, 91)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tree) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("export") / "best.pt", tree, root_bias={"body": -0.5})


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    return export.main()


def photos(shape: tuple[int, ...]) -> torch.Tensor:
    pictures = [np.array(noise(shape[3], shape[2], seed)) for seed in range(shape[0])]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def same(exported, model: export.Exportable, shape: tuple[int, ...]) -> None:
    """Leaves and scores of both, compared."""
    leaves, scores = exported(photos(shape))
    expected_leaves, expected_scores = model(photos(shape))
    assert leaves.shape == (shape[0], *shape[2:])
    assert (leaves == expected_leaves).float().mean() >= 0.999
    torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("tree_file", "rule", "tta"),
    [
        *((tree_file, rule, "off") for tree_file in ("pascal_part", "cityscapes") for rule in DECODE_RULES),
        *(("pascal_part", "logit_sum", tta) for tta in ("flip", "full")),
    ],
)
def test_what_is_exported_predicts_as_the_predictor_does(tmp_path, rule, tree_file, tta):
    tree = Hierarchy.load(Path(__file__).parents[1] / "configs" / "hierarchies" / f"{tree_file}.json")
    bias = {tree.names[tree.roots[1]]: 0.3}
    path = write_checkpoint(tmp_path / "c.pt", tree, root_bias=bias, decode=rule, monitor="max mIoU1")
    predictor = Predictor.load(path, "cpu", tta=tta)
    leaves, scores = export.Exportable(predictor)(photos((2, 3, 37, 50)))
    for seed in range(2):
        expected = predictor(noise(50, 37, seed))
        assert np.mean(leaves[seed].numpy() == expected.leaves) >= 0.999
        np.testing.assert_allclose(scores[seed].numpy(), expected.scores, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["off", "flip"])
def test_torch_and_onnx_agree_with_pytorch_for_any_batch_and_size(
    checkpoint, sample_data, tmp_path, monkeypatch, capsys, tta
):
    formats = "torch,onnx" if all(map(importlib.util.find_spec, export.PACKAGES["onnx"])) else "torch"
    check = ("--format", formats, "--tta", tta, "--check", sample_data / "JPEGImages", "--check-photos", 2)
    assert run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path, *check) == 0
    assert "100.0000 % of the pixels of 2 photos" in capsys.readouterr().out
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["root_bias"] == {"body": -0.5}
    assert described["tree"]["name"] == Hierarchy.from_dict(described["tree"]).name

    model = export.Exportable(Predictor.load(checkpoint, "cpu", tta=tta))
    program = torch.export.load(tmp_path / "model.pt2").module()
    for shape in SIZES:
        same(program, model, shape)
    if "onnx" in formats:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        for shape in SIZES:
            same(lambda x: map(torch.from_numpy, session.run(None, {"photos": x.numpy()})), model, shape)


def test_a_folder_holds_all_that_the_predictor_needs_and_a_card(checkpoint, tmp_path, monkeypatch, capsys, tree):
    pytest.importorskip("safetensors")
    folder = tmp_path / "model"
    options = ("--format", "folder", "--decode", "prob_sum", "--tta", "flip", "--licence", "cc-by-4.0")
    assert run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path, *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    again = Predictor.load(folder, "cpu")
    assert str(again) == "decoded by prob_sum, tta flip"
    expected = Predictor.load(checkpoint, "cpu", decode="prob_sum", tta="flip")(noise(50, 37))
    assert torch.equal(again(noise(50, 37)).logits, expected.logits)
    card = (folder / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "Not evaluated" in card
    assert all(name in card for name in tree.names)

    with_scores = Predictor.load(checkpoint, "cpu")
    record = {"photos": 7, "scores": {"mIoU1": 0.5, "pixel_accuracy": None}}
    card = export.card(with_scores, with_scores.config, record, "x")
    assert "On 7 photos:" in card
    assert "| mIoU1 | 50.00 |" in card
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        Predictor.load(folder, "cpu")


def test_the_card_takes_scores_of_this_checkpoint_and_these_options_alone(tmp_path, tree):
    path = tmp_path / "experiments" / "x" / "models_checkpoints" / "best.pt"
    config = Predictor.load(write_checkpoint(path, tree, exp_name="x", root_dir=str(tmp_path)), "cpu").config
    record = {"checkpoint_sha256": checkpoint_digest(path), "decode": config.decode, "root_bias": {}, "tta": "off"}
    for name, changed in (("other", {"checkpoint_sha256": "0"}), ("flip", {"tta": "flip"}), ("own", {})):
        assert export.scores_of(path, config) is None
        (path.parents[1] / "evaluation" / name).mkdir(parents=True)
        write_json(record | changed, path.parents[1] / "evaluation" / name / "scores.json")
    assert export.scores_of(path, config) == record


def test_a_program_that_says_something_else_is_found_out(checkpoint, sample_data):
    predictor = Predictor.load(checkpoint, "cpu")
    some = export.photos_in(sample_data / "JPEGImages", 2)
    wrong = export.agreement(
        lambda x: torch.full((1, *x.shape[2:]), 254, dtype=torch.uint8), predictor, some, torch.uint8, "wrong"
    )
    assert wrong == 0


def test_missing_packages_are_named_with_the_way_to_get_them(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"--format onnx needs onnxscript: pip install -r requirements-export.txt"):
        run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "tflite"), "'tflite' is not one of torch, onnx, folder"),
        (("--format", "torch"), r"model.pt2 exists already; choose another --out, or give --overwrite"),
        (("--format", "torch", "--overwrite", "--check", "nowhere"), "expected a folder with photos"),
    ],
)
def test_mistakes_are_said_before_anything_is_exported(checkpoint, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "model.pt2").write_bytes(b"of an earlier export")
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path, *arguments)
    assert (tmp_path / "model.pt2").read_bytes() == b"of an earlier export"
