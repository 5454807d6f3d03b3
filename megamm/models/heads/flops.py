"""Floating-point operations of a head, forward and backward, on what a micro-batch really holds.

Every matrix costs 6 a weight and row: a head trains, and the norm before its first matrix wants a gradient too. Attention costs its
forward three times. Matching, and what fills a padded grid, counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megamm.config import Head

_TRAINED, _PASSES = 6, 3


def head_flops(settings: Head, width: int, states: Sequence[int]) -> int:
    """Operations of a head over the documents of a micro-batch.

    Args:
        settings: Of the recipe.
        width: Of the states.
        states: How many states the head looks at, of each document.
    """
    count = {"linear": _linear, "detector": _detector, "segmenter": _segmenter, "ctc": _ctc}[settings.kind]
    return count(settings, width, states)


def _linear(settings: Head, width: int, states: Sequence[int]) -> int:
    widths = [width, *[settings.hidden_size] * settings.hidden_layers, len(settings.labels)]
    return _TRAINED * len(states) * sum(one * after for one, after in pairwise(widths))


def _detector(settings: Head, width: int, states: Sequence[int]) -> int:
    size, num_states = settings.hidden_size, sum(states)
    by_cells = settings.queries == "cells"
    num_queries = num_states if by_cells else settings.num_queries * len(states)
    mlp, square = 8 * size * size, size * size
    if by_cells:
        layer = num_queries * (9 * size + mlp)
        attention = 0
    else:
        # Four matrices of the queries among themselves, two for what they ask the picture, two for what it says.
        layer = num_queries * (6 * square + mlp) + num_states * 2 * square
        attention = 4 * size * settings.num_queries * (num_queries + num_states)
    said = num_queries * (square + size * (4 + len(settings.labels) + 1))
    weights = num_states * width * size + settings.num_layers * layer + said
    return _TRAINED * weights + _PASSES * settings.num_layers * attention


def _segmenter(settings: Head, width: int, states: Sequence[int]) -> int:
    size, num_states = settings.hidden_size, sum(states)
    pixels = [num_states * 4**stage for stage in range(settings.num_layers + 1)]
    stages = sum(pixels[1:]) * 9 * size * size
    return _TRAINED * (num_states * width * size + stages + pixels[-1] * size * (len(settings.labels) + 2))


def _ctc(settings: Head, width: int, states: Sequence[int]) -> int:
    num_steps = sum(states) * settings.time_steps
    return _TRAINED * num_steps * settings.hidden_size * (width + 1 + len(settings.labels))
