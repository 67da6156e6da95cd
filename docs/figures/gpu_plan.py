"""What a GPU is asked in one training step, counted on a CPU: operations, bytes, FLOPs, and the time they bound.

    python docs/figures/gpu_plan.py --cfg configs/hseg_bce_100.json

Nothing is computed: the step of train.py runs on tensors without memory, with the network in bf16. An operation that
touches data is at least one kernel launch. Its bytes are those of the tensors it reads and writes, each once; a card
with a large cache moves less, one that needs workspaces moves more.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from configs.config import Config, load_config
from manage.learner import Learner
from manage.network import load_hierarchy
from utils.cli import run_main
from utils.dataset import Sample

# Dense bf16 with float32 sums, and memory bandwidth, from the makers' data sheets.
CARDS = {
    "A100 SXM 80 GB": (312e12, 2.039e12),
    "H100 SXM 80 GB": (989e12, 3.35e12),
    "H200 SXM 141 GB": (989e12, 4.8e12),
    "RTX 4090": (165e12, 1.008e12),
}
WITHOUT_LAUNCH = {"detach", "_unsafe_view", "lift_fresh", "empty", "empty_like", "promote_types", "aminmax"}


class Counter(TorchDispatchMode):
    """Lists bytes and FLOPs of every operation that touches data."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[int, int]] = []

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
            self.operations.append((sum(distinct.values()), flops))
        return result

    def seconds(self, peak: float, bandwidth: float) -> float:
        """No card of that peak and bandwidth is faster, one operation after the other."""
        return sum(max(size / bandwidth, flops / peak) for size, flops in self.operations)


def count_step(config: Config) -> Counter:
    """One step of `Learner`, of batch_size crops of crop_size."""
    hierarchy, shape = load_hierarchy(config), (config.batch_size, config.crop_size, config.crop_size)
    learner = Learner(replace(config, amp="bf16"), hierarchy, [1] * hierarchy.num_nodes, torch.device("cpu"))
    learner.set_train_mode(is_frozen=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        images, labels = torch.zeros(shape[0], 3, *shape[1:]), torch.zeros(shape, dtype=torch.uint8)
        for _ in range(2):  # momentum and tables are made in the first step
            counter.operations.clear()
            learner.step([Sample(images, labels, torch.arange(shape[0]), [""] * shape[0])], config.lr)
    return counter


def plan_table(config: Config) -> str:
    """Markdown: what a step asks for, and a row for each card."""
    counter = count_step(config)
    moved, flops = map(sum, zip(*counter.operations, strict=True))
    lines = [
        f"One step of {config.exp_name}: {config.encoder}, {config.criterion}, {config.batch_size} crops of "
        f"{config.crop_size}, bf16, not compiled: {len(counter.operations)} launches, {moved / 1e9:.2f} GB moved, "
        f"{flops / 1e12:.3f} TFLOP.",
        "",
        "| card | a step takes at least | photos/s at most |",
        "|---|---:|---:|",
    ]
    for card, speed in CARDS.items():
        seconds = counter.seconds(*speed)
        lines.append(f"| {card} | {1e3 * seconds:.1f} ms | {config.batch_size / seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", metavar="F", help="a JSON config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values")
    arguments = parser.parse_intermixed_args()
    print(plan_table(load_config(arguments.cfg, arguments.overrides)))


if __name__ == "__main__":
    run_main(main)
