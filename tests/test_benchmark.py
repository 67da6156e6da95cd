"""The benchmark times what it says, and the plan for a GPU counts what a step does."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.config import Config
from docs.figures.gpu_plan import CARDS, count_step, plan_table
from manage.network import build_network, load_hierarchy


def test_a_step_has_the_flops_of_network_and_backward(slim) -> None:
    config = Config(crop_size=32, batch_size=2, pretrained=False)
    network = build_network(config, load_hierarchy(config))
    with FlopCounterMode(display=False) as flops:
        network(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert sum(count for _, count in count_step(config).operations) == flops.get_total_flops()
    assert all(card in plan_table(config) for card in CARDS)
