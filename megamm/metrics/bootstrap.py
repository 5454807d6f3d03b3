"""Confidence intervals by bootstrap over samples: how far a figure would move, had other samples of the same kind been held out.

Works for every metric that can be asked about a selection of samples. Such a `Statistic` takes int64[n], numbers of samples, some of
them several times, and returns the metric over these; NaN where the selection leaves it undefined.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3 (the percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamm.core.errors import DataError
from megamm.metrics.pairs import check_pairs

Statistic = Callable[[NDArray[np.int64]], float]


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the metric lies in the middle `level` of the resamples.

    Attributes:
        low: Lower end, in the metric's unit.
        high: Upper end.
        level: Share of the resamples between them.
        num_resamples: Those in which the metric was defined.
    """

    low: float
    high: float
    level: float
    num_resamples: int


def interval(statistic: Statistic, num_samples: int, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile interval of a statistic over resamples of `num_samples` samples, drawn with replacement.

    The same seed draws the same samples for every statistic of equally many, so that intervals of two models compare.

    Args:
        statistic: The metric over a selection of samples.
        num_samples: How many there are.
        num_resamples: How many times the statistic is asked: 1000 for cheap ones; 200 serve where each costs milliseconds, as COCO's do.
        level: Share of the resamples inside, in (0, 1).
        seed: Of the draws.

    Raises:
        DataError: No samples, or the statistic is undefined in every resample.
    """
    if num_samples < 1 or num_resamples < 1 or not 0 < level < 1:
        asked = f"num_samples={num_samples}, num_resamples={num_resamples}, level={level}"
        raise DataError(f"{asked} gives no interval; give 1 or more of both and a level between 0 and 1")
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(generator.integers(num_samples, size=num_samples)) for _ in range(num_resamples)], dtype=np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        raise DataError(f"no interval: the metric is undefined in each of {num_resamples} resamples of {num_samples} samples")
    # An infinite perplexity stays infinite: interpolating towards it would make NaN.
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method="nearest" if np.isinf(drawn).any() else "linear")
    return Interval(float(low), float(high), level, len(drawn))


def mean_of(values: ArrayLike) -> Statistic:
    """The mean of one value a sample, such as whether it was right."""
    array = np.asarray(values, dtype=np.float64)
    return lambda indices: float(array[indices].mean())


def ratio_of(numerators: ArrayLike, denominators: ArrayLike) -> Statistic:
    """The ratio of two sums over samples, such as edits over words; NaN where the lower sum is 0."""
    pairs = np.stack([np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)], axis=1)

    def statistic(indices: NDArray[np.int64]) -> float:
        above, below = pairs[indices].sum(axis=0)
        return float(above / below) if below else float("nan")

    return statistic


def resampled(metric: Callable[[list[Any], list[Any]], float], predictions: Sequence[Any], references: Sequence[Any]) -> Statistic:
    """Any metric of predictions and references, computed anew over each selection.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    check_pairs(predictions, references)
    return lambda indices: metric([predictions[index] for index in indices], [references[index] for index in indices])
