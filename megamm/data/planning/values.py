"""Strict readers of plain JSON values, for states and places: what is something else is refused, never converted.

`int` and `tuple` would make a number of "3" and three keys of "abc".
"""

from __future__ import annotations

from typing import Any


def as_list(value: Any) -> list[Any]:
    """A list; TypeError where it is none."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} is no list")
    return value


def as_text(value: Any) -> str:
    """A text; TypeError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def as_texts(value: Any) -> tuple[str, ...]:
    """A list of texts; TypeError where it is none."""
    return tuple(as_text(one) for one in as_list(value))


def as_count(value: Any) -> int:
    """A whole number from 0 on; ValueError where it is none."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no whole number from 0 on")
    return value


def as_counts(value: Any, num_due: int) -> tuple[int, ...]:
    """So many whole numbers; TypeError or ValueError where it is something else."""
    counts = tuple(as_count(one) for one in as_list(value))
    if len(counts) != num_due:
        raise ValueError(f"{len(counts)} numbers where {num_due} are due")
    return counts


def as_weights(value: Any, num_due: int) -> tuple[int, ...]:
    """So many weights of which one draws; TypeError or ValueError where it is something else."""
    weights = as_counts(value, num_due)
    if not any(weights):
        raise ValueError("weights that draw nothing")
    return weights
