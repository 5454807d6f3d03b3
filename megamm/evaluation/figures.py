"""Figures of records: those that a task judges its answers by, and how likely documents were."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megamm.core.errors import DataError
from megamm.evaluation.records import Answered, Record, Scored
from megamm.metrics.bootstrap import interval, ratio_of
from megamm.tasks import TASKS, Figure


def grouped(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Dataset and task -> their records in the order of their places, in the order of datasets and tasks."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.dataset, record.task, record.shard, record.number)):
        groups.setdefault((record.dataset, record.task), []).append(record)
    return groups


def answer_figures(task: str, records: Sequence[Answered]) -> list[Figure]:
    """How a task judges answers, its own figure first.

    Raises:
        DataError: They cannot be judged, such as boxes where no reference has one.
    """
    parse = TASKS[task].parse
    return TASKS[task].figures([parse(record.answer) for record in records], [parse(record.reference) for record in records])


def score_figures(records: Sequence[Scored]) -> list[Figure]:
    """Perplexity a token and bits a byte."""
    num_tokens = np.array([record.num_tokens for record in records])
    nats = np.array([record.nats for record in records])
    bits = nats / math.log(2)
    num_bytes = np.array([record.num_bytes for record in records])
    counts: Counter[int] = Counter()
    for record in records:
        counts.update(record.token_counts)
    total = int(num_tokens.sum())
    # The best guess without looking: these tokens' own frequencies.
    guess = -sum(count * math.log(count / total) for count in counts.values())
    a_token = ratio_of(nats, num_tokens)
    return [
        Figure("perplexity", lambda indices: math.exp(a_token(indices)), math.exp(guess / total) if total else None),
        Figure("bits_per_byte", ratio_of(bits, num_bytes), guess / math.log(2) / float(num_bytes.sum()) if total else None),
    ]


def value_of(figure: Figure, chosen: np.ndarray) -> float | None:
    """A figure over some samples, int64[n]; None where it is no finite number."""
    try:
        return finite(figure.statistic(chosen))
    except OverflowError:
        return None


def interval_of(figure: Figure, chosen: np.ndarray) -> tuple[float | None, float | None]:
    """Ends of a figure's 95 % interval by bootstrap over some samples, int64[n]; None where there is none."""
    if len(chosen) < 2:
        return None, None
    try:
        found = interval(lambda drawn: figure.statistic(chosen[drawn]), len(chosen), num_resamples=figure.num_resamples)
    except (DataError, OverflowError):
        # Undefined in every resample, or beyond any number in one.
        return None, None
    return finite(found.low), finite(found.high)


def finite(value: float | None) -> float | None:
    """The value where it is a finite number."""
    return value if value is not None and math.isfinite(value) else None
