"""Tries counted one after the other: what a try raises as lost is its loss, and the next one is still made."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.drills.drill import Tally
from benchmarks.drills.engine.jobs import Stuck
from megamm.core.errors import MegaMMError

Attempt = Callable[[], list[str]]
"""One try; returns what went wrong."""


def count(attempts: Iterable[Attempt], note: str = "") -> Tally:
    """Make every try."""
    return Tally.of([outcome(attempt) for attempt in attempts], note)


def outcome(attempt: Attempt) -> str:
    """What went wrong with a try, in a line; empty where nothing did."""
    try:
        return "; ".join(attempt()[:3])
    except (Stuck, MegaMMError, OSError) as error:
        return f"{type(error).__name__}: {error}"
