"""What one step's line of metrics says: losses, rates, shares of time, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import torch

from megamm.config import Recipe
from megamm.core.types import Batch
from megamm.engine.distributed import World
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.flops import BatchSizes, train_flops
from megamm.telemetry.peak import peak_flops
from megamm.train.step import GlobalCounts, StepResult

_GIB = 1 << 30


class StepReport:
    """Measures steps of this rank. State: when the running step began and when its data was there.

    Args:
        recipe: Which towers train, and the device's peak where it is not known by name.
        config: The model.
        world: The ranks.
    """

    def __init__(self, recipe: Recipe, config: MegaMMConfig, world: World):
        self._recipe = recipe
        self._config = config
        self._world = world
        self._peak = peak_flops(world.device, recipe.telemetry.peak_tflops)
        self._began = self._arrived = time.monotonic()

    def begin(self) -> None:
        """A step begins: it waits for its data."""
        self._began = time.monotonic()

    def data_arrived(self) -> None:
        """The step's micro-batches are there."""
        self._arrived = time.monotonic()

    def model_flops(self, batches: Sequence[Batch]) -> float:
        """Model FLOPs of this rank's micro-batches; 0 where the device's peak is not known and nothing would come of it."""
        if self._peak is None:
            return 0.0
        return sum(train_flops(self._config, BatchSizes.of(batch), self._recipe.model) for batch in batches)

    def values(self, counts: GlobalCounts, result: StepResult) -> dict[str, float]:
        """Numbers of the step that just ended, over all ranks; waiting and memory are this rank's.

        Returns:
            Name -> number. `mfu` is there where the device's peak is known; it counts real tokens only.
        """
        seconds = time.monotonic() - self._began
        values = {
            "loss": result.loss,
            **{f"loss/{task}": loss for task, loss in result.task_losses.items()},
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": counts.num_tokens,
            "supervised_tokens": counts.num_supervised,
            "seconds": seconds,
            "tokens_per_second": counts.num_tokens / seconds,
            "supervised_tokens_per_second": counts.num_supervised / seconds,
            "padding_share": 1 - counts.num_tokens / counts.num_slots,
            "data_wait_share": (self._arrived - self._began) / seconds,
            "memory_gib": peak_memory_gib(self._world.device),
            "update_applied": int(result.applied),
        }
        if self._peak is not None:
            values["mfu"] = counts.flops / seconds / (self._peak * self._world.size)
        return values


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process held so far: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
