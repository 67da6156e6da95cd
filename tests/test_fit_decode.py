"""tools/fit_decode.py: offsets per root, fitted on train photos alone."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from configs.config import DECODE_RULES, differences, load_config
from manage.checkpoint import load_checkpoint
from manage.predictor import Predictor
from tests.test_predict import SLIM, write_checkpoint
from tools import fit_decode
from tools.fit_decode import Pixels, best_by_root, count, decide, fit, sweep, value
from utils.decode import DECODERS
from utils.errors import UserError
from utils.hierarchy import Hierarchy

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cityscapes() -> Hierarchy:
    return Hierarchy.load(REPO / "configs" / "hierarchies" / "cityscapes.json")  # eight roots


def random_pixels(h: Hierarchy, n: int = 400, seed: int = 0) -> Pixels:
    torch.manual_seed(seed)
    labels = torch.tensor(h.leaves)[torch.randint(h.num_leaves, (n,))]
    return Pixels(labels, *best_by_root("logit_sum", torch.randn(h.num_nodes, n), h))


@pytest.mark.parametrize("rule", DECODE_RULES)
def test_the_best_of_each_root_is_all_that_an_offset_decides_between(rule, cityscapes):
    torch.manual_seed(0)
    logits, bias = torch.randn(1, cityscapes.num_nodes, 20, 20), torch.randn(len(cityscapes.roots))
    pixels = Pixels(torch.zeros(400), *best_by_root(rule, logits[0].flatten(1), cityscapes))
    expected = DECODERS[rule](logits, cityscapes, bias)[0].flatten()
    assert torch.equal(decide(pixels, bias), expected.long())


def test_one_sweep_counts_what_deciding_at_every_offset_counts(cityscapes):
    pixels, bias, n = random_pixels(cityscapes), torch.randn(len(cityscapes.roots)), cityscapes.num_nodes
    grid = torch.linspace(-3, 3, 13) + 0.0123  # no offset equals a margin
    for root in range(1, len(cityscapes.roots)):
        matrices = sweep(pixels, bias, root, grid, n)
        for offset, matrix in zip(grid, matrices, strict=True):
            moved = bias.clone()
            moved[root] = offset
            assert torch.equal(matrix, count(pixels.labels, decide(pixels, moved), n))


def test_a_constant_error_of_one_root_is_found_and_undone(tree):
    pixels = random_pixels(tree, n=2000)
    pixels.labels = decide(pixels, torch.zeros(2))  # a network that is right everywhere ...
    assert fit(pixels, "mIoU1", 0.05, tree) == [0, 0]
    pixels.scores[1] += 2.0  # ... but for the body, which it overrates
    background, offset = fit(pixels, "mIoU1", 0.05, tree)
    assert background == 0
    assert offset == pytest.approx(-2, abs=0.051)


@pytest.mark.parametrize("target", ["mIoU1", "mIoU2", "pixel_accuracy"])
def test_the_fit_never_loses_on_the_pixels_it_saw(cityscapes, target):
    pixels, n = random_pixels(cityscapes), cityscapes.num_nodes
    bias = torch.tensor(fit(pixels, target, 0.05, cityscapes))
    before, after = (
        value(count(pixels.labels, decide(pixels, b), n), target, cityscapes) for b in (torch.zeros_like(bias), bias)
    )
    assert after > before


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


def test_a_copy_of_the_checkpoint_carries_the_offset(config, tmp_path, monkeypatch, capsys):
    original = tmp_path / "experiments" / "x" / "models_checkpoints" / "best.pt"
    before = original.read_bytes()
    run(monkeypatch, "--cfg", config, "--decode", "prob_sum")
    copy = original.parent / "fitted" / "best_prob_sum.pt"
    assert original.read_bytes() == before
    saved = load_checkpoint(copy)["config"]
    assert saved["decode"] == "prob_sum"
    assert set(saved["root_bias"]) <= {"body"}
    assert Predictor.load(copy, "cpu").decoding.rule == "prob_sum"
    override = f"root_bias={json.dumps(saved['root_bias'])}"
    assert override in capsys.readouterr().out
    assert load_config(config, [override]).root_bias == saved["root_bias"]
    with pytest.raises(UserError, match="exists already; give --overwrite"):
        run(monkeypatch, "--cfg", config, "--decode", "prob_sum")


def test_without_a_gain_nothing_is_written_and_it_is_said(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit_decode, "fit", lambda *_: [0.0, -9.0])
    run(monkeypatch, "--cfg", config)
    assert "no gain on photos that were not fitted: nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "experiments" / "x" / "models_checkpoints" / "fitted").exists()


def test_the_command_to_score_it_gives_the_same_config(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "moved data").symlink_to(load_config(config).data_dir)
    overrides = [f"root_data_dir={tmp_path / 'moved data'}", "decode=mass", 'criterion={"bce": 1.0}', "n_val_photos=2"]
    run(monkeypatch, "--cfg", config, "--decode", "leaf", *overrides)
    name, script, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (name, script, words[:3]) == ("python", "evaluate.py", ["--cfg", str(config), "--checkpoint"])
    scored, wanted = load_config(config, words[4:]), load_config(config, overrides)
    assert scored.decode == "leaf"
    assert set(differences(scored, wanted)) <= {"decode", "root_bias"}


def test_photos_are_a_seeded_part_of_train(config):
    values = load_config(config)
    train = values.ids_file("train").read_text().split()
    chosen = fit_decode.choose_ids(values, 4, seed=1)
    assert len(set(chosen)) == 4
    assert set(chosen) <= set(train)
    assert chosen == fit_decode.choose_ids(values, 4, seed=1)
    assert chosen != fit_decode.choose_ids(values, 4, seed=2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train_sample_ids_file=val_id.txt", "train ids are in val, too"),
        ("--target=mIoU9", "--target mIoU9: expected one of mIoU1"),
    ],
)
def test_val_photos_are_never_fitted_and_the_target_is_a_score(config, monkeypatch, argument, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--cfg", config, argument)
