"""tools/fit_decode.py: offsets per root, fitted on train photos alone."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from configs.config import DECODE_RULES
from manage.checkpoint import load_checkpoint
from manage.predictor import Predictor
from tests.factory import REPO
from tests.test_predict import SLIM, write_checkpoint
from tools import fit_decode
from tools.fit_decode import decide, fit
from utils.decode import DECODERS, leaf_scores
from utils.errors import UserError
from utils.hierarchy import Hierarchy


@pytest.mark.parametrize("rule", DECODE_RULES)
def test_deciding_with_an_offset_is_decoding_with_it(rule):
    h = Hierarchy.load(REPO / "configs" / "hierarchies" / "cityscapes.json")  # seven roots
    logits, bias = torch.randn(1, h.num_nodes, 20, 20), torch.randn(len(h.roots))
    decided = decide(leaf_scores(rule, logits[0].flatten(1), h), bias, h)
    assert torch.equal(decided, DECODERS[rule](logits, h, bias)[0].flatten().long())


def test_a_constant_error_of_one_root_is_found_and_undone(tree):
    scores = torch.randn(tree.num_leaves, 2000, generator=torch.Generator().manual_seed(0))
    labels = decide(scores, torch.zeros(2), tree)  # a network that is right everywhere ...
    assert fit((labels, scores), 1.0, tree).tolist() == [0, 0]
    scores[[leaf for leaf in range(7) if leaf != 0]] += 2.0  # ... but for the body, which it overrates
    background, offset = fit((labels, scores), 1.0, tree).tolist()
    assert background == 0
    assert offset == pytest.approx(-2, abs=0.051)


# --- on files ---
@pytest.fixture
def config(sample_data, tmp_path, tree) -> Path:
    values = {"exp_name": "x", "root_dir": str(tmp_path), "root_data_dir": str(sample_data), "device": "cpu"}
    values |= {"num_workers": 0, "pretrained": False, "decoder_channels": SLIM}
    (tmp_path / "x.json").write_text(json.dumps(values))
    path = tmp_path / "experiments" / "x" / "models_checkpoints" / "best.pt"
    write_checkpoint(path, tree, [0.0] + [-6.0] * (tree.num_nodes - 1))  # it never sees a body, but for an offset
    return tmp_path / "x.json"


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["fit_decode.py", *map(str, arguments)])
    fit_decode.main()


def test_a_copy_of_the_checkpoint_carries_the_offset_and_its_command_is_told(config, tmp_path, monkeypatch, capsys):
    original = tmp_path / "experiments" / "x" / "models_checkpoints" / "best.pt"
    before, overrides = original.read_bytes(), ["decode=mass", 'criterion={"bce": 1.0}', "n_val_photos=2"]
    run(monkeypatch, "--cfg", config, "--decode", "prob_sum", *overrides)
    copy = original.parent / "fitted" / "best_prob_sum.pt"
    assert original.read_bytes() == before
    saved = load_checkpoint(copy)["config"]
    assert (saved["decode"], set(saved["root_bias"])) == ("prob_sum", {"body"})
    assert Predictor.load(copy, "cpu").decoding.root_bias == saved["root_bias"]
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words == ["python", "evaluate.py", "--cfg", str(config), "--checkpoint", str(copy), *overrides[1:]]
    with pytest.raises(UserError, match="exists already; move it away"):
        run(monkeypatch, "--cfg", config, "--decode", "prob_sum")


def test_without_a_gain_nothing_is_written_and_it_is_said(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit_decode, "fit", lambda *_: torch.tensor([0.0, -9.0]))
    run(monkeypatch, "--cfg", config)
    assert "no gain on photos that were not fitted: nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "experiments" / "x" / "models_checkpoints" / "fitted").exists()


def test_val_photos_are_never_fitted(config, monkeypatch):
    with pytest.raises(UserError, match="train ids are in val, too"):
        run(monkeypatch, "--cfg", config, "train_sample_ids_file=val_id.txt")
