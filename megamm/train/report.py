"""What one step's line of metrics says: losses, rates, shares of time, memory; and a warning where data are too slow."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from megamm.config import Recipe
from megamm.core.logging import get_logger
from megamm.core.types import Batch
from megamm.engine.distributed import World
from megamm.models.flops import BatchSizes, train_flops
from megamm.telemetry.peak import peak_flops
from megamm.train.build import Trainer
from megamm.train.step import GlobalCounts, StepResult

_GIB = 1 << 30
_WATCHED_STEPS = 50
_MAX_WAIT_SHARE = 0.1
_log = get_logger("train")


class StepReport:
    """Measures steps. State: when the running step began, had its data and ended; waiting of the last steps, rank by rank.

    Args:
        recipe: Which towers train, and the device's peak where it is not known by name.
        trainer: The model.
        world: The ranks.
    """

    def __init__(self, recipe: Recipe, trainer: Trainer, world: World):
        self._recipe = recipe
        self._config = trainer.config
        self._ranks = trainer.ranks
        self._world = world
        self._num_watched = 0
        self._watched_seconds = 0.0
        self._waits_seconds = np.zeros(world.size)
        self._peak = peak_flops(world.device, recipe.telemetry.peak_tflops)
        self._began = self._arrived = self._ended = time.monotonic()

    def begin(self) -> None:
        """A step begins: it waits for its data."""
        self._began = time.monotonic()

    def data_arrived(self) -> None:
        """The step's micro-batches are there."""
        self._arrived = time.monotonic()

    @property
    def waited_seconds(self) -> float:
        """How long this rank waited for the running step's data."""
        return self._arrived - self._began

    def end(self, counts: GlobalCounts) -> None:
        """The step is trained. Warns where the last steps waited long for their data, naming the slowest rank."""
        self._ended = time.monotonic()
        self._num_watched += 1
        self._watched_seconds += self._ended - self._began
        self._waits_seconds += counts.waits_seconds
        if self._num_watched == _WATCHED_STEPS:
            share = self._waits_seconds.max() / self._watched_seconds
            if share > _MAX_WAIT_SHARE and self._world.is_main:
                _log.warning(
                    "the last %d steps spent %.0f %% of their time waiting for data, most on rank %d; "
                    "raise data.decode_workers, or look at where its shards lie",
                    _WATCHED_STEPS,
                    100 * share,
                    int(self._waits_seconds.argmax()),
                )
            self._num_watched, self._watched_seconds = 0, 0.0
            self._waits_seconds[:] = 0

    def model_flops(self, batches: Sequence[Batch]) -> float:
        """Model FLOPs of this rank's micro-batches; 0 where the device's peak is not known and nothing would come of it."""
        if self._peak is None:
            return 0.0
        return sum(train_flops(self._config, BatchSizes.of(batch), self._recipe.model, self._recipe.adapter) for batch in batches)

    def values(self, counts: GlobalCounts, result: StepResult) -> dict[str, float]:
        """Numbers of the step that just ended, over all ranks; waiting is that of the slowest rank, memory this rank's.

        Returns:
            Name -> number. `mfu` is there where the device's peak is known; it counts real tokens only.
        """
        seconds = self._ended - self._began
        values = {
            "loss": result.loss,
            **{f"loss/{task}": loss for task, loss in result.task_losses.items()},
            "grad_norm": result.grad_norm,
            **{f"lr/{name}": rate for name, rate in result.learning_rates.items()},
            "tokens": counts.num_tokens,
            "supervised_tokens": counts.num_supervised,
            "seconds": seconds,
            "tokens_per_second": counts.num_tokens / seconds,
            "supervised_tokens_per_second": counts.num_supervised / seconds,
            "padding_share": 1 - counts.num_tokens / counts.num_slots,
            "data_wait_share": max(counts.waits_seconds) / seconds,
            "memory_gib": peak_memory_gib(self._world.device),
            "update_applied": int(result.applied),
        }
        if self._ranks is not None:
            values["adapter/mean_rank"] = self._ranks.mean_rank
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
