"""An exponential moving average of a network's weights and buffers."""

import copy

import torch
from torch import nn


class EMA:
    """`module` is the average: validated, kept in checkpoints and used for prediction.

    In its first updates the decay grows as (1 + n) / (10 + n) up to `decay`, so that a short run does not average in
    its random start. The number of updates is a plain number: nothing waits for the device.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes the network's weights of now into the average; counters are copied."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [*zip(self.module.state_dict().values(), network.state_dict().values(), strict=True)]
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([own for own, _ in averaged], [new for _, new in averaged], weight)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)
        self.updates += 1
