"""Learning-rate factors as functions of the step: easy to plot, to test and to resume."""

import math

STEPS_AT, STEP_FACTOR = (0.6, 0.85), 0.1  # of the step schedule: at which shares of all steps, times what
POLY_POWER = 0.9


def lr_factor(schedule: str, step: int, total: int, warmup: float = 0.0) -> float:
    """What the learning rate of optimiser step `step` (from 0) of `total` is multiplied by, in [0, 1].

    The first `warmup` steps grow in a line; then the schedule falls from its peak.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))  # 0 at the peak, 1 after the last step
    if schedule == "poly":
        return (1.0 - progress) ** POLY_POWER
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "step":
        return STEP_FACTOR ** sum(step >= share * total for share in STEPS_AT)
    return 1.0
