"""Learning-rate factors as functions of the step: easy to plot, to test and to resume."""

import math

from configs.config import Config


def lr_factor(step: int, steps_per_epoch: int, config: Config) -> float:
    """What the learning rate of optimiser step `step` (from 0) is multiplied by, in [0, 1]."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.n_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))  # 0 at the peak, 1 after the last step
    if config.schedule == "poly":
        return (1.0 - progress) ** config.poly_power
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "step":
        return config.step_factor ** sum(step >= epoch * steps_per_epoch for epoch in config.step_epochs)
    return 1.0
