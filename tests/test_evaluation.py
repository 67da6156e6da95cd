"""evaluate.py: where the scores of a checkpoint go, and what is recorded of it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.config import Config
from manage import evaluation_manager, inference
from manage.data import Tolerance, ValLoader
from manage.evaluation_manager import EvaluationManager, EvaluationOptions, Scorer
from manage.predictor import Predictor
from tests.test_predict import SLIM, write_checkpoint
from utils.cli import progress
from utils.errors import UserError
from utils.files import read_json
from utils.ids import read_ids
from utils.images import read_labels
from utils.losses import build_criterion
from utils.metrics import LevelScores


@pytest.fixture
def best(tmp_path: Path, tree):
    """Writes the checkpoint `best` of the experiment `ours` anew; returns its path."""
    path = tmp_path / "experiments" / "ours" / "models_checkpoints" / "best.pt"
    return lambda bias=0.0, **keys: write_checkpoint(path, tree, bias, exp_name="ours", **keys)


@pytest.fixture
def config(sample_data: Path, tmp_path: Path, best) -> Config:
    """Of an experiment `ours`, with a checkpoint `best`."""
    best()
    keys = {"exp_name": "ours", "root_dir": str(tmp_path), "root_data_dir": str(sample_data), "device": "cpu"}
    return Config(**keys, num_workers=0, pretrained=False, decoder_channels=SLIM)


def evaluate(config: Config, checkpoint: str | Path | None = None, **options) -> tuple[Path, dict]:
    """The folder of the scores, and what scores.json holds."""
    options = EvaluationOptions(checkpoint and str(checkpoint), **({"pictures": False} | options))
    manager = EvaluationManager(config, options)
    return manager.folder, manager.run()


def test_scores_of_another_experiments_checkpoint_leave_the_own_ones_in_place(config, tmp_path, tree):
    other = write_checkpoint(tmp_path / "experiments/theirs/models_checkpoints/best.pt", tree, exp_name="theirs")
    fitted = write_checkpoint(config.checkpoints_dir / "fitted" / "best_mass.pt", tree, exp_name="ours")
    config.amp = "bf16"
    own, record = evaluate(config)
    assert [record["checkpoint"], record["amp"], record["config"]["amp"]] == ["best.pt", "bf16", "auto"]
    assert record["checkpoint_sha256"] == hashlib.sha256((config.checkpoints_dir / "best.pt").read_bytes()).hexdigest()
    foreign, record = evaluate(config, other)
    assert record["checkpoint"] == str(other)
    names = [own.name, foreign.name, EvaluationManager(config, EvaluationOptions(str(fitted))).folder.name]
    assert names == ["best", "theirs-best", "best_mass"]


# --- one truth for decoding ---
def test_rule_and_offset_are_the_checkpoints_own_in_evaluation_and_prediction(config, best, tree, capsys) -> None:
    own = {"decode": "leaf", "root_bias": {"body": -1.5}}
    path = best(**own)
    config.decode, config.root_bias = "mass", {"body": 1.0}
    changed = tree.to_dict() | {"name": "another name"}
    del changed["nodes"][0]["background"]
    config.hierarchy = str(config.root / "tree.json")
    Path(config.hierarchy).write_text(json.dumps(changed))
    _, record = evaluate(config)  # without a name: best
    assert {key: record[key] for key in own} == own
    assert str(Predictor.load(path, "cpu").decoding) == "leaf with root_bias {'body': -1.5}"
    said = capsys.readouterr().out
    assert "note: the config's decode mass is not used, but the checkpoint's own leaf" in said
    assert "note: the config's tree has other background: scores are by the checkpoint's" in said
    assert "decoded by leaf with root_bias {'body': -1.5}" in said
    photo = next(config.images_dir.glob(f"{read_ids(config.ids_file('val'))[0]}.*"))
    _, record = evaluate(config, limit=1)
    leaves = torch.from_numpy(Predictor.load(path, "cpu").predict_file(photo).leaves)
    labels = torch.from_numpy(read_labels(config.labels_dir / f"{photo.stem}.png"))
    expected = LevelScores(tree).update(leaves[None], labels[None])
    with np.load(config.experiment_dir / "evaluation" / "best-limit1" / "photos.npz") as counts:
        assert np.array_equal(counts["leaf"][0], expected)


def test_what_the_command_line_names_wins_and_other_rules_go_without_the_offset(config, best) -> None:
    best(root_bias={"body": 1000.0})
    folder, record = evaluate(config, decode="leaf")
    assert (folder.name, record["decode"], record["root_bias"]) == ("best-leaf", "leaf", {})
    folder, plain = evaluate(config, decode="leaf", root_bias={}, all_rules=True)
    _, biased = evaluate(config, decode="leaf", root_bias={"body": 1000.0}, all_rules=True)
    for rule, scores in biased["rules"].items():
        assert (scores == plain["rules"][rule]) == (rule != "leaf")


@pytest.mark.parametrize("devices", [(), ("cpu",)])
def test_logits_that_are_not_finite_stop_it_by_the_photos_id_and_old_scores_stay(config, best, monkeypatch, devices):
    folder, record = evaluate(config)
    monkeypatch.setattr(inference, "LAUNCHING", devices)
    best(float("nan"))
    with pytest.raises(UserError, match=r"photo 'drawn_\d+': the network's logits are not"):
        evaluate(config)
    assert read_json(folder / "scores.json") == record


# --- several photos at once ---
@pytest.mark.parametrize("short_side", [None, 48])
def test_photos_that_go_through_together_count_the_same_to_the_last_pixel(config, best, tree, monkeypatch, short_side):
    predictor = Predictor.load(best(short_side=short_side), "cpu")
    groups, counts, fed = [], [], evaluation_manager.rows_of_each
    spy = lambda network, group, **how: (groups.append(len(group)), fed(network, group, **how))[1]  # noqa: E731
    monkeypatch.setattr(evaluation_manager, "rows_of_each", spy)
    ids = read_ids(config.ids_file("val"))
    loader = ValLoader(replace(config, short_side=short_side), tree, ids)
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(inference, "LAUNCHING", devices)
        scorer = Scorer(predictor.network, tree, [predictor.decoding], "bce", {}, loss=build_criterion("bce", tree))
        photos = {photo.sample.index: photo for photo in scorer.photos(loader, Tolerance(0, ids), progress(total=4))}
        assert len(photos) == 4
        counts.append((scorer, photos))
    (one_by_one, alone), (at_once, together) = counts
    assert groups[:4] == [1] * 4
    assert 1 < max(groups[4:]) <= sum(groups[4:]) == 4
    for one, other in zip(one_by_one.meters[0].tensors()[:2], at_once.meters[0].tensors()[:2], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(one_by_one.loss_sum, at_once.loss_sum)
    assert all(torch.equal(alone[i].leaves, together[i].leaves) for i in range(4))


# --- again ---
def test_an_equal_evaluation_is_replaced_and_another_one_set_aside(config, best) -> None:
    def folders() -> list[str]:
        return sorted(folder.name for folder in (config.experiment_dir / "evaluation").iterdir())

    folder, _ = evaluate(config)
    (folder / "scores.csv").write_text("of the first run")
    evaluate(config)
    assert folders() == ["best"]
    assert (folder / "scores.csv").read_text() != "of the first run"
    evaluate(config, pictures=True)  # which the earlier one had not
    best(decode="leaf")
    _, latest = evaluate(config)
    assert len(folders()) == 3
    assert read_json(folder / "scores.json") == latest
    (folder / "scores.json").write_text("[]")
    evaluate(config)
    assert len(folders()) == 4


def test_views_and_windows_are_recorded_and_overlays_have_the_photos_own_size(config, best) -> None:
    best(short_side=32)
    folder, record = evaluate(config, tta="flip", tile=256, limit=1, pictures=True)
    assert (folder.name, record["tta"], record["tile"]) == ("best-limit1-flip-tile256", "flip", 256)
    photo = next(config.images_dir.glob(f"{read_ids(config.ids_file('val'))[0]}.*"))
    with Image.open(photo) as taken, Image.open(folder / f"pictures/overlay/{photo.stem}.jpg") as drawn:
        assert drawn.width == max(taken.width, 200)  # room for the legend
        assert read_labels(folder / f"pictures/parts/{photo.stem}.png").shape == taken.size[::-1]
