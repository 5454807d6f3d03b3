"""Learning-rate factor by optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from megamm.config import Schedule
from megamm.core.errors import ConfigError


def lr_factor(schedule: Schedule, num_steps: int) -> Callable[[int], float]:
    """The factor on the peak learning rate for step 0, 1, …

    Step s uses factor(s): the first step of a warm-up of n uses 1/n, the last step of the run comes just above `min_ratio`.

    Args:
        schedule: Shape.
        num_steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: Warm-up and decay together are longer than the run.

    Source: cosine, Loshchilov and Hutter 2017, eq. 5 without restarts; WSD, Hu et al. 2024 (MiniCPM), section 4.2.
    """
    warmup, decay = schedule.warmup_steps, schedule.decay_steps if schedule.kind == "wsd" else 0
    if warmup + decay > num_steps:
        raise ConfigError(
            f"schedule.warmup_steps={warmup} + schedule.decay_steps={decay} exceed train.steps={num_steps}; shorten them or train longer"
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule.kind == "cosine":
            progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
            return schedule.min_ratio + (1 - schedule.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        if decay and step >= num_steps - decay:
            progress = min(1.0, (step - (num_steps - decay)) / decay)
            return 1 - (1 - schedule.min_ratio) * progress
        return 1.0

    return factor
