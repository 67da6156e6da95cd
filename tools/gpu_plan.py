"""What a GPU will be asked in one training step, counted on a CPU: operations, bytes, FLOPs, and the time they bound.

    python tools/benchmark.py --gpu-plan --cfg configs/hseg_bce_100.json

Nothing is computed: the step of train.py runs on tensors without memory, with the network in bf16. An operation that
touches data is at least one kernel launch. Its bytes are those of the tensors it reads and writes, each once; a card
with a large cache moves less, one that needs workspaces moves more.
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from configs.config import Config
from manage.learner import Learner
from manage.network import load_hierarchy
from utils.dataset import Sample

# Dense bf16 with float32 sums, and memory bandwidth, from the makers' data sheets.
CARDS = {
    "A100 SXM 80 GB": (312e12, 2.039e12),
    "H100 SXM 80 GB": (989e12, 3.35e12),
    "H200 SXM 141 GB": (989e12, 4.8e12),
    "RTX 4090": (165e12, 1.008e12),
}
WITHOUT_LAUNCH = {"detach", "_unsafe_view", "lift_fresh", "empty", "empty_like", "promote_types", "aminmax"}


@dataclass
class Part:
    """What one part of a step asks for."""

    operations: list[tuple[int, int]] = field(default_factory=list)  # (bytes, FLOPs) of each

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.operations)

    @property
    def flops(self) -> int:
        return sum(flops for _, flops in self.operations)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """No card of that peak and bandwidth is faster, one operation after the other."""
        return sum(max(size / bandwidth, flops / peak) for size, flops in self.operations)


class Counter(TorchDispatchMode):
    """Adds every operation that touches data to the part that is being counted."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Part] = {}
        self.current = Part()

    def enter(self, name: str) -> None:
        self.current = self.parts.setdefault(name, Part())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":  # labels are checked on the CPU alone, and these hold no values
            return 0
        result = func(*args, **(kwargs or {}))
        is_check = isinstance(result, Tensor) and result.dtype == torch.bool and result.ndim == 0
        if func.namespace == "aten" and not func.is_view and not is_check and name not in WITHOUT_LAUNCH:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            distinct = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self.current.operations.append((sum(distinct.values()), flops))
        return result


def count_step(config: Config) -> dict[str, Part]:
    """The parts of one step of `Learner`, of batch_size crops of crop_size."""
    hierarchy, shape = load_hierarchy(config), (config.batch_size, config.crop_size, config.crop_size)
    ones = [1] * hierarchy.num_nodes
    counts = SimpleNamespace(pixels=ones, labelled=ones)
    learner = Learner(replace(config, amp="bf16"), hierarchy, counts, torch.device("cpu"))
    learner.set_train_mode(is_frozen=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        images, labels = torch.zeros(shape[0], 3, *shape[1:]), torch.zeros(shape, dtype=torch.uint8)
        watch(learner, counter)
        for _ in range(2):  # momentum and tables are made in the first step
            counter.parts.clear()
            counter.enter("batch")
            learner.step([Sample(images, labels, torch.arange(shape[0]), [""] * shape[0])], config.lr)
    return counter.parts


def watch(learner: Learner, counter: Counter) -> None:
    """Tells the counter where a step is."""
    network, criterion = learner.trained, learner.criterion

    def forward(images: Tensor) -> Tensor:
        counter.enter("network, forward")
        logits = network(images)
        counter.enter("loss, forward")
        logits.register_hook(lambda _: counter.enter("network, backward, and gradient norm"))
        return logits

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        value = criterion(logits, labels)
        counter.enter("loss, backward")
        return value

    learner.trained, learner.criterion = forward, loss
    learner.optimizer.register_step_pre_hook(lambda *_: counter.enter("optimiser, averaged weights"))


def plan_table(config: Config) -> str:
    """Markdown: a row for each part, and for the whole step."""
    parts = count_step(config)
    whole = Part([operation for part in parts.values() for operation in part.operations])
    lines = [
        f"One step of {config.exp_name}: {config.encoder}, {config.criterion}, {config.batch_size} crops of "
        f"{config.crop_size}, bf16, not compiled; each card takes at least",
        "",
        f"| | launches | GB moved | TFLOP | {' | '.join(CARDS)} |",
        f"|---|{'---:|' * (3 + len(CARDS))}",
    ]
    for name, part in (parts | {"**whole step**": whole}).items():
        bounds = [f"{1e3 * part.seconds(*card):.1f} ms" for card in CARDS.values()]
        numbers = [str(len(part.operations)), f"{part.bytes / 1e9:.2f}", f"{part.flops / 1e12:.3f}", *bounds]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    rates = [f"{config.batch_size / whole.seconds(*card):.0f} photos/s" for card in CARDS.values()]
    lines.append(f"| at most | | | | {' | '.join(rates)} |")
    return "\n".join(lines)
