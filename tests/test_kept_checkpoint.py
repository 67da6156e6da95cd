"""A checkpoint of an earlier commit is gone on from with the losses that its own commit had next.

Where a format or a default changes on purpose, keep the old file, and write one of the new format beside it:

    python -m tests.test_kept_checkpoint
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

import models.hseg
from configs.config import Config
from manage.checkpoint import FORMAT, load_checkpoint
from manage.train_manager import TrainManager
from tests.factory import TINY, SlimEncoder, make_data
from utils.errors import UserError
from utils.files import write_json

KEPT = Path(__file__).with_name("kept")
KEYS = {"optimizer": "adamw", "lr": 0.003, "ema_decay": 0.9, "n_epochs": 4, "color_jitter": 0.3, "n_train_photos": 6}


def next_losses(root: Path, resume: str | None = None, **keys) -> list[float]:
    """Of the epochs that a run has left; its data set is drawn anew."""
    if not (root / "data").exists():
        make_data(root / "data")
    config = Config(**TINY | KEYS | {"root_dir": str(root), "root_data_dir": "data"} | keys)
    assert TrainManager(config).run(resume) == 0
    lines = (root / "experiments" / config.exp_name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines for key in ("loss_train", "loss_val")]


@pytest.mark.parametrize("file", sorted(KEPT.glob("*.pt")), ids=lambda file: file.stem)
def test_a_kept_checkpoint_is_gone_on_from_with_the_same_losses(slim, file, tmp_path):
    expected = json.loads(file.with_suffix(".json").read_text())
    assert next_losses(tmp_path, str(file), exp_name="new") == pytest.approx(expected, rel=1e-3)


def test_format_1_is_a_start_for_another_run_alone(slim, tmp_path):
    old = tmp_path / "old.pt"
    state = load_checkpoint(KEPT / f"format{FORMAT}.pt")
    del state["loss_steps"], state["ema_updates"]
    torch.save(state | {"format": 1}, old)
    with pytest.raises(UserError, match=rf"{old}: its state cannot be taken over .* init_from={old}$"):
        next_losses(tmp_path, str(old))
    assert len(next_losses(tmp_path, exp_name="new", init_from=str(old), n_epochs=1)) == 2


if __name__ == "__main__":
    models.hseg.build_encoder = SlimEncoder
    with tempfile.TemporaryDirectory() as folder:
        losses = next_losses(Path(folder))
        file = Path(folder) / "experiments/tiny/models_checkpoints/checkpoint_3.pt"
        (KEPT / f"format{FORMAT}.pt").write_bytes(file.read_bytes())
    write_json(losses[6:], KEPT / f"format{FORMAT}.json")
