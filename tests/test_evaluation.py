"""evaluate.py: where the scores of a checkpoint go, and what is recorded of it."""

import hashlib
from pathlib import Path

import pytest

from configs.config import Config
from manage.checkpoint import checkpoint_digest
from manage.evaluation_manager import EvaluationManager, EvaluationOptions
from tests.test_predict import SLIM, write_checkpoint


@pytest.fixture
def config(sample_data: Path, tmp_path: Path, tree) -> Config:
    """Of an experiment `ours`, with a checkpoint `best`."""
    keys = {"exp_name": "ours", "root_dir": str(tmp_path), "root_data_dir": str(sample_data), "device": "cpu"}
    config = Config(**keys, num_workers=0, pretrained=False, decoder_channels=SLIM)
    config.checkpoints_dir.mkdir(parents=True)
    write_checkpoint(config.checkpoints_dir / "best.pt", tree, exp_name="ours")
    return config


def evaluate(config: Config, checkpoint: str | Path) -> tuple[Path, dict]:
    """The folder of the scores, and what scores.json holds."""
    manager = EvaluationManager(config, EvaluationOptions(str(checkpoint), limit=None, pictures=False))
    return manager.folder, manager.run()


def test_the_checkpoint_that_was_scored_is_recorded_by_its_digest(config: Config) -> None:
    path = config.checkpoints_dir / "best.pt"
    _, record = evaluate(config, "best")
    assert record["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()[:-64]).hexdigest() == checkpoint_digest(path)


def test_the_precision_of_the_evaluation_is_recorded_not_the_trainings(config: Config) -> None:
    config.amp = "bf16"
    _, record = evaluate(config, "best")
    assert (record["amp"], record["config"]["amp"]) == ("bf16", "off")


def test_a_file_too_short_to_be_a_checkpoint_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "short.pt").write_bytes(b"PK")
    assert checkpoint_digest(tmp_path / "short.pt") is None
    assert checkpoint_digest(tmp_path / "missing.pt") is None


def test_scores_of_another_experiments_checkpoint_leave_the_own_ones_in_place(config, tmp_path, tree) -> None:
    other = tmp_path / "experiments" / "theirs" / "models_checkpoints"
    other.mkdir(parents=True)
    write_checkpoint(other / "best.pt", tree, exp_name="theirs")
    own, record = evaluate(config, "best")
    assert (own.name, record["checkpoint"]) == ("best", "best.pt")
    foreign, record = evaluate(config, other / "best.pt")
    assert (foreign.name, record["checkpoint"]) == ("theirs-best", str(other / "best.pt"))
    assert sorted(folder.name for folder in own.parent.iterdir()) == ["best", "theirs-best"]


def test_own_checkpoints_are_known_by_any_path(config, monkeypatch, tree) -> None:
    (config.checkpoints_dir / "fitted").mkdir()
    fitted = write_checkpoint(config.checkpoints_dir / "fitted" / "best_mass.pt", tree, exp_name="ours")
    monkeypatch.chdir(config.checkpoints_dir)
    for path, name in ((config.checkpoints_dir / "best.pt", "best"), ("./best.pt", "best"), (fitted, "best_mass")):
        assert EvaluationManager(config, EvaluationOptions(str(path))).folder.name == name
