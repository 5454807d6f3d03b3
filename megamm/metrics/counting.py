"""How far a counted number is off."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from megamm.metrics.pairs import check_pairs


def absolute_errors(predictions: Sequence[float | None], references: Sequence[float]) -> NDArray[np.float64]:
    """`|prediction − reference|` of each sample, float64[N], in things. An answer that is no number (None) counts as 0 things.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    check_pairs(predictions, references)
    return np.abs(np.array([answer or 0 for answer in predictions], dtype=np.float64) - np.asarray(references, dtype=np.float64))


def mean_absolute_error(predictions: Sequence[float | None], references: Sequence[float]) -> float:
    """Mean of `absolute_errors`, in things.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    return float(absolute_errors(predictions, references).mean())


def exact_share(predictions: Sequence[float | None], references: Sequence[float]) -> float:
    """Share of predictions that equal their reference; None equals nothing.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    check_pairs(predictions, references)
    return sum(answer == reference for answer, reference in zip(predictions, references, strict=True)) / len(references)


def constant_absolute_error(references: Sequence[float]) -> float:
    """Mean absolute error of always answering the median, the best number to answer without looking.

    Raises:
        DataError: There are none.
    """
    check_pairs(references, references)
    return mean_absolute_error([median(references)] * len(references), references)
