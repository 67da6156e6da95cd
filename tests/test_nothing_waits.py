"""In a steady training step nothing asks the device for a value: such a question waits for all work before it."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.config import Config
from manage.train_manager import TrainManager
from tests.factory import TINY, make_data
from utils.hierarchy import Hierarchy

ASKS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]

KEYS = (
    {"criterion": {"tree_min": 1.0, "ce": 1.0}, "optimizer": "adamw", "ema_decay": 0.9, "grad_clip": 1.0},
    {"criterion": "focal_tree_min", "accumulate": 2, "color_jitter": 0.3, "rotation": 10.0, "amp": "fp16"},
)


class Asked(TorchDispatchMode):
    """Counts the operations that give a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.is_on = Counter(), True

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        to_host = name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu") != args[0].device
        if self.is_on and (name in ASKS or to_host):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", KEYS)
def test_ten_steps_ask_for_no_value(slim, tmp_path, monkeypatch, device, keys):
    make_data(tmp_path / "data", train=24, val=1)
    places = {"root_dir": str(tmp_path), "root_data_dir": "data", "device": device, "crop_size": 64, "batch_size": 1}
    manager = TrainManager(Config(**TINY | places | keys))
    manager._train_epoch()  # what is made once is made here
    manager.epoch, manager.batch = 1, 0
    groups = manager._groups()
    manager.batches.start_at(1, 0)
    asked, index_of = Asked(), Hierarchy.index_of

    def uncounted(tree, labels):  # it asks whether the labels are of the tree, on a CPU alone, which waits for nobody
        asked.is_on = device != "cpu"
        try:
            return index_of(tree, labels)
        finally:
            asked.is_on = True

    monkeypatch.setattr(Hierarchy, "index_of", uncounted)
    sync = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None
    sync("error")  # on a GPU a step that waits is an error
    try:
        with asked:
            for _ in range(10):
                manager.train_step(next(groups))
                manager.step += 1
                manager._read_steps()
                manager._stop_if_asked()
    finally:
        sync("default")
    assert not asked.counts
    assert len(manager.late) == 4, "the last steps are still on their way"


def test_a_question_is_counted():
    with Asked() as asked:
        value = torch.ones(2).sum()
        float(value)
        bool(value > 0)
    assert sum(asked.counts.values()) == 2
