"""How much each task's own figure suffers from changed pictures and sounds, sample by sample against the clean ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megamm.core.errors import DataError
from megamm.evaluation.changes import Change
from megamm.evaluation.figures import answer_figures, finite, grouped, interval_of, value_of
from megamm.evaluation.records import Answered, Identity, Result
from megamm.tasks import Figure


@dataclass(frozen=True, slots=True)
class ChangeRow:
    """A task's own figure under one change at one strength.

    Attributes:
        dataset: Name of the held-out dataset.
        task: Name of the task.
        change: Name of the change.
        strength: In the change's unit.
        unit: In words.
        samples: Samples that were answered both clean and changed: all the figures here are over these.
        metric: Its name.
        value: With changed media; None where it is not a finite number.
        low: Lower end of its 95 % interval by bootstrap over samples; None where there is none.
        high: Upper end.
        clean: The figure with media as they are.
        difference: `value - clean`.
        difference_low: Lower end of its 95 % interval, by a bootstrap that draws both answers of a sample together.
        difference_high: Upper end.
    """

    dataset: str
    task: str
    change: str
    strength: float
    unit: str
    samples: int
    metric: str
    value: float | None
    low: float | None
    high: float | None
    clean: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None


def change_rows(results: Mapping[Identity, Result], changes: Sequence[Change]) -> list[ChangeRow]:
    """Compute the rows, by dataset and task, then by change and strength; a task without figures has none.

    Args:
        results: Of clean and changed samples, by their identity.
        changes: What was done.
    """
    rows: list[ChangeRow] = []
    records = [one for one in results.values() if isinstance(one, Answered) and not one.change]
    for clean in grouped(records).values():
        # Why a task has no figures, its clean rows say.
        with contextlib.suppress(DataError):
            rows += _rows(clean, results, changes)
    return rows


def _rows(clean: Sequence[Answered], results: Mapping[Identity, Result], changes: Sequence[Change]) -> list[ChangeRow]:
    rows = []
    for change in changes:
        for strength in change.strengths:
            pairs = [(one, results.get((*one.identity[:3], change.named(strength)))) for one in clean]
            both = [(one, other) for one, other in pairs if isinstance(other, Answered)]
            if both:
                rows.append(_row(both, change, strength))
    return rows


def _row(both: Sequence[tuple[Answered, Answered]], change: Change, strength: float) -> ChangeRow:
    first = both[0][0]
    clean, changed = (answer_figures(first.task, side)[0] for side in zip(*both, strict=True))
    everything = np.arange(len(both))
    difference = Figure(
        changed.name, lambda indices: changed.statistic(indices) - clean.statistic(indices), num_resamples=changed.num_resamples
    )
    value, before = value_of(changed, everything), value_of(clean, everything)
    return ChangeRow(
        dataset=first.dataset,
        task=first.task,
        change=change.name,
        strength=strength,
        unit=change.unit,
        samples=len(both),
        metric=changed.name,
        value=value,
        **_ends("", interval_of(changed, everything) if value is not None else (None, None)),
        clean=before,
        difference=finite(value - before) if value is not None and before is not None else None,
        **_ends("difference_", interval_of(difference, everything) if None not in (value, before) else (None, None)),
    )


def _ends(prefix: str, ends: tuple[float | None, float | None]) -> dict[str, float | None]:
    return {f"{prefix}low": ends[0], f"{prefix}high": ends[1]}


def shown_media(results: Iterable[Result], medium: str) -> Iterator[Identity]:
    """Samples with a medium that were answered clean: those whose media are worth changing."""
    for one in results:
        if isinstance(one, Answered) and not one.change and medium in one.media:
            yield one.identity
