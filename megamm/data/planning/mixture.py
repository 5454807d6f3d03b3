"""Which dataset a position belongs to: a periodic schedule of integer weights, always within one sample of the exact shares.

Every sample of a period has a window of slots in which it must be placed for its dataset to be neither ahead nor late;
serving the earliest deadline first always succeeds. A position is looked up in the period's table, so seeking costs nothing.

Source: Steiner and Yeomans, "Level Schedules for Mixed-Model, Just-in-Time Processes" (1993), theorem 1.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from megamm.config import Data
from megamm.core.errors import ConfigError
from megamm.core.names import did_you_mean

MAX_PERIOD = 1 << 16


@dataclass(frozen=True, slots=True)
class Segment:
    """Weights that hold from a position on.

    Attributes:
        start: First position.
        weights: Integer weight a dataset; their sum is the period.
        drawn: Samples a dataset that earlier segments have drawn.
    """

    start: int
    weights: tuple[int, ...]
    drawn: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Weights of a recipe from a step on.

    Attributes:
        step: The first step; 0 for the beginning.
        weights: Integer weight a dataset, in the order of their sorted names.
    """

    step: int
    weights: tuple[int, ...]


def planned_weights(data: Data) -> tuple[StepWeights, ...]:
    """All weights that a recipe plans, from step 0 on; entries of `data.schedule` change those that they name.

    Raises:
        ConfigError: Steps that do not ascend, an unknown dataset, or weights that draw nothing.
    """
    weights = {name: data.train[name].weight for name in sorted(data.train)}
    planned = [StepWeights(0, integer_weights(list(weights.values())))]
    for change in data.schedule:
        if change.step <= planned[-1].step:
            raise ConfigError(f"data.schedule has step {change.step} after step {planned[-1].step}; list its entries by ascending step")
        if unknown := sorted(set(change.weights) - set(weights)):
            raise ConfigError(
                f"data.schedule at step {change.step} names {unknown[0]!r}, which is not in data.train"
                f"{did_you_mean(unknown[0], weights)}; a dataset that comes later is listed there with weight 0"
            )
        weights |= change.weights
        planned.append(StepWeights(change.step, integer_weights(list(weights.values()))))
    return tuple(planned)


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in proportion to `weights`; a dataset of weight 0 is not drawn.

    Shares that need a period beyond `MAX_PERIOD` are rounded to it (every dataset above 0 keeps at least one sample a period).

    Raises:
        ConfigError: No weight above 0, or one that is negative or no number.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ConfigError(
            f"data weights {list(weights)} draw nothing; set data.train.NAME.weight above 0 for one dataset and to 0 or more for all"
        )
    # Through the shortest decimal, so that 0.1 means one tenth.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(value.denominator for value in exact))
    numbers = [int(value * scale) for value in exact]
    if sum(numbers) // math.gcd(*numbers) > MAX_PERIOD:
        total = sum(exact)
        numbers = [max(1, round(value / total * MAX_PERIOD)) if value else 0 for value in exact]
    divisor = math.gcd(*numbers)
    return tuple(number // divisor for number in numbers)


@dataclass(frozen=True)
class Mixture:
    """Position -> (dataset, position inside the dataset), under a history of weights.

    The state is the segments alone; equal segments give equal samples at every position.
    """

    segments: tuple[Segment, ...]

    @classmethod
    def start(cls, weights: tuple[int, ...]) -> Mixture:
        """A mixture whose first weights hold from position 0."""
        return cls((Segment(0, weights, (0,) * len(weights)),))

    def changed(self, weights: tuple[int, ...], start: int) -> Mixture:
        """The mixture with other weights from position `start` on; what was drawn before stays drawn.

        Raises:
            ConfigError: `start` lies before the last change.
        """
        last = self.segments[-1]
        if start < last.start:
            raise ConfigError(f"data weights cannot change at position {start}: they changed at {last.start} already")
        if start == last.start:
            return Mixture((*self.segments[:-1], Segment(start, weights, last.drawn)))
        return Mixture((*self.segments, Segment(start, weights, self.drawn(start))))

    def drawn(self, position: int) -> tuple[int, ...]:
        """Samples a dataset among the positions before `position`, which must not lie before the last segment."""
        last = self.segments[-1]
        datasets, _ = _schedule(last.weights)
        periods, rest = divmod(position - last.start, len(datasets))
        counts = np.bincount(datasets[:rest], minlength=len(last.weights)).tolist()
        return tuple(drawn + periods * weight + count for drawn, weight, count in zip(last.drawn, last.weights, counts, strict=True))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and position inside the dataset of some positions.

        Args:
            positions: int64[n], ascending.

        Returns:
            int64[n] and int64[n].
        """
        starts = [segment.start for segment in self.segments]
        borders = np.searchsorted(positions, [*starts[1:], np.iinfo(np.int64).max])
        datasets, places = np.empty_like(positions), np.empty_like(positions)
        low = 0
        for segment, high in zip(self.segments, borders.tolist(), strict=True):
            if low < high:
                datasets[low:high], places[low:high] = _locate(segment, positions[low:high])
            low = max(low, high)
        return datasets, places


def _locate(segment: Segment, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    datasets, ranks = _schedule(segment.weights)
    periods, slots = np.divmod(positions - segment.start, len(datasets))
    chosen = datasets[slots]
    return chosen, np.array(segment.drawn)[chosen] + periods * np.array(segment.weights)[chosen] + ranks[slots]


@lru_cache(maxsize=16)
def _schedule(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period: for each slot its dataset, and how many earlier slots of the period have the same one."""
    period = sum(weights)
    datasets, ranks = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    waiting = [(0, dataset, 0) for dataset, weight in enumerate(weights) if weight]
    ready: list[tuple[int, int, int]] = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, dataset, rank = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(rank + 1) * period // weights[dataset]), dataset, rank))
        _, dataset, rank = heapq.heappop(ready)
        datasets[slot], ranks[slot] = dataset, rank
        if rank + 1 < weights[dataset]:
            heapq.heappush(waiting, ((rank + 1) * period // weights[dataset], dataset, rank + 1))
    datasets.flags.writeable = ranks.flags.writeable = False
    return datasets, ranks
