"""A training step: precision, compilation, accumulation and clipping do what they say, and nothing waits."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.config import Config
from manage.learner import EMA
from manage.train_manager import TrainManager
from tests.factory import TINY, make_data
from utils.dataset import Sample
from utils.errors import UserError
from utils.hierarchy import Hierarchy

SIZE = 32


@pytest.fixture
def start(slim, tmp_path, sample_data):
    """Makes managers that differ from each other in the given keys alone; all start at the same weights."""
    places = {"root_dir": str(tmp_path), "root_data_dir": str(sample_data)}

    def make(**keys) -> TrainManager:
        made = TrainManager(Config(**TINY | places | {"schedule": "constant", "freeze_batchnorm": True} | keys))
        made.learner.set_train_mode(is_frozen=False)
        return made

    return make


def batch_of(*seeds: int) -> Sample:
    """One random photo a seed, with a seventh of its pixels void and more void in later photos."""
    images, labels = [], []
    for position, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        images.append(torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8))
        label = torch.randint(0, 7, (SIZE, SIZE), generator=generator, dtype=torch.uint8)
        label[: 4 * position] = 255
        labels.append(label)
    return Sample(torch.stack(images), torch.stack(labels), torch.tensor(seeds), [""] * len(seeds))


def weights(run: TrainManager) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in run.learner.network.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerances) -> None:
    torch.testing.assert_close(other, one, **tolerances or {"rtol": 1e-4, "atol": 1e-6})


def gradients(run: TrainManager) -> Tensor:
    return torch.cat([p.grad.flatten() for p in run.learner.network.parameters()])


def test_accumulated_batches_equal_one_large_batch(start):
    large, small = start(batch_size=4), start(batch_size=1, accumulate=4)
    for seeds in ((1, 2, 3, 4), (5, 6, 7, 8)):  # photos have unequal numbers of known pixels
        *images_and_labels, index, _ = batch_of(*seeds)
        parts = [Sample(*(t[i : i + 1] for t in (*images_and_labels, index)), [""]) for i in range(4)]
        torch.testing.assert_close(small.train_step(parts), large.train_step([batch_of(*seeds)]), rtol=1e-5, atol=0)
    assert_same(weights(large), weights(small))


def test_bf16_stays_close_to_float32_and_its_loss_is_float32(start):
    full, mixed = start(), start(amp="bf16")
    exact, rounded = full.train_step([batch_of(1, 2)]), mixed.train_step([batch_of(1, 2)])
    assert rounded.dtype == torch.float32
    assert rounded != exact  # bf16 was at work
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
    alike = torch.nn.functional.cosine_similarity(gradients(full), gradients(mixed), dim=0)
    assert alike > 0.97
    assert all(p.dtype == torch.float32 for p in mixed.learner.network.parameters())


def test_an_overflow_in_fp16_leaves_the_weights_and_lowers_the_scale_until_none_is_left(start):
    run = start(amp="fp16")
    before, overflows = weights(run), 1 + int(math.log2(run.learner.scaler.get_scale()))
    spoil = run.learner.network.segmentation_head.register_full_backward_hook(  # no finite gradient; the loss is
        lambda _module, inputs, _outputs: tuple(None if g is None else g * math.inf for g in inputs)
    )
    for _ in range(overflows):
        scale = run.learner.scaler.get_scale()
        run.train_step([batch_of(1, 2)])
        assert run.learner.scaler.get_scale() < scale
    assert all(not state["momentum_buffer"].any() for state in run.learner.optimizer.state.values())
    run._read_steps(late=0)
    run.train_step([batch_of(1, 2)])
    with pytest.raises(UserError, match=r"gradient norm (nan|inf) is not finite"):
        run._read_steps(late=0)
    assert_same(before, weights(run), rtol=0, atol=0)
    spoil.remove()
    run.learner.step([batch_of(1, 2)], lr=1.0)
    assert all(value.isfinite().all() for value in weights(run).values())


def test_a_compiled_training_gives_the_same_steps_and_checkpoint_and_compiles_once(start, monkeypatch):
    compile_it, counters = torch.compile, torch._dynamo.utils.counters
    # the eager backend captures the graph like any other and needs no C++ compiler
    monkeypatch.setattr(torch, "compile", lambda what, **keys: compile_it(what, backend="eager", **keys))
    plain, compiled = start(), start(compile=True)
    torch._dynamo.reset()
    counters.clear()
    for seeds in ((1, 2), (3, 4), (5, 6)):
        batch = batch_of(*seeds)
        torch.testing.assert_close(compiled.train_step([batch]), plain.train_step([batch]))
    assert counters["stats"]["unique_graphs"] == 2, "the network and the criterion, once each"
    assert not counters["graph_break"]
    assert_same(weights(plain), weights(compiled))
    assert compiled.state()["model"].keys() == plain.state()["model"].keys()


def test_clipping_scales_the_gradient_to_its_limit_and_frozen_statistics_stay(start):
    free, clipped = start(freeze_batchnorm=False), start(grad_clip=0.01)
    key = "encoder.stages.0.1.running_mean"
    before = weights(clipped)[key]
    for run in (free, clipped):
        run.train_step([batch_of(1, 2)])
    torch.testing.assert_close(gradients(clipped).norm(), torch.tensor(0.01), rtol=1e-3, atol=0)
    assert torch.equal(weights(clipped)[key], before)
    assert not torch.equal(weights(free)[key], before)


def test_a_frozen_encoder_takes_no_part_in_the_clipping(start):
    run = start(grad_clip=1e-3, weight_decay=0.0)
    run.learner.network.encoder.stages[0][0].weight.register_hook(lambda gradient: 1e6 * gradient)
    before = weights(run)
    run.learner.step([batch_of(1, 2)], lr=1.0, is_frozen=True)
    moved = {key: value - before[key] for key, value in weights(run).items() if value.is_floating_point()}
    assert not any(change.any() for key, change in moved.items() if key.startswith("encoder."))
    assert torch.cat([change.flatten() for change in moved.values()]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_average_follows_its_formula_and_ramps_up():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    network[0].weight.data.fill_(0.0)
    ema, expected = EMA(network, 0.5), 0.0
    for n in range(12):
        network[0].weight.data.fill_(n + 1.0)
        network[1].num_batches_tracked += 1
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        ema.update(network)
    assert float(ema.module[0].weight) == pytest.approx(expected, rel=1e-5)
    assert int(ema.module[1].num_batches_tracked) == 12


# --- nothing waits: who asks the device for a value waits for all work before it ---
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
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu") != args[0].device
        if self.is_on and (name in ASKS or (to_host and not kwargs.get("non_blocking"))):
            self.counts[name] += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", KEYS)
def test_ten_steps_ask_for_no_value(start, tmp_path, monkeypatch, device, keys):
    data = make_data(tmp_path / "data", train=24, val=1)
    manager = start(root_data_dir=str(data), device=device, batch_size=1, crop_size=64, **keys)
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
    with asked:
        float(torch.ones(2).sum())
    assert sum(asked.counts.values()) == 1, "a question is counted"
    assert len(manager.late) == 4, "the last steps are still on their way"
