"""Packing samples into rows: dealt out evenly by size and kind, what is left by best fit.

Best fit alone puts samples of like length, so of one task, into one row, and a step of few rows then holds little else. Here
as many rows as the window needs at least are open from the beginning, and samples are dealt out to them from the largest
down, each to the row that has least of what the sample takes most of. Every row thus gets its share of long and short, of
pictures and sounds; the smallest samples come last and even out what remains.

Source: the rule of the least load is Graham, "Bounds on Multiprocessing Timing Anomalies" (1969), here for several resources.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

UNFIT = -1
_FEW = 4
_GOOD_ENOUGH = 1.02


def pack(lengths: np.ndarray, capacity: tuple[int, int, int]) -> np.ndarray:
    """Assign the samples of a window to rows.

    Args:
        lengths: int[n, 3], tokens, patches and frames of each sample.
        capacity: Tokens, patches and frames that a row holds.

    Returns:
        int64[n], the row of each sample, numbered from 0 without gaps; `UNFIT` for samples without tokens and for those
        that no row could hold.
    """
    rows = np.full(len(lengths), UNFIT, dtype=np.int64)
    # One line for each resource: numpy is slow along lines of three.
    columns, limits = np.ascontiguousarray(lengths.T, dtype=np.int64), np.array(capacity)[:, None]
    fits = np.flatnonzero((columns <= limits).all(axis=0) & (columns[0] > 0))
    if not fits.size:
        return rows
    columns = columns.take(fits, axis=1)
    demand = columns.sum(axis=1) / capacity
    main, num_rows = int(demand.argmax()), int(np.ceil(demand.max()))
    samples_a_row = len(fits) / num_rows
    nothing = np.zeros((3, 0), dtype=np.int64)
    # Where a row holds few samples there is little to even out with: large ones must match.
    if samples_a_row < _FEW:
        packed = _best_fit(columns, nothing, capacity, main)
    else:
        packed = _deal_out(columns, capacity, main, num_rows)
        if samples_a_row < 2 * _FEW and packed.max() + 1 > _GOOD_ENOUGH * num_rows:
            packed = min(packed, _best_fit(columns, nothing, capacity, main), key=np.max)
    rows[fits] = packed
    return rows


def _deal_out(lengths: np.ndarray, capacity: tuple[int, int, int], main: int, num_rows: int) -> np.ndarray:
    """Rows of samples (int64[3, n]) that all fit a row; numbers without gaps."""
    limits = np.array(capacity)[:, None]
    shares = lengths / limits
    kinds, largest = shares.argmax(axis=0), shares.max(axis=0)
    sizes = np.where(lengths[main] > 0, shares[main], largest)
    # One phase for each class of size (a factor of 4), and in it for each resource that is what a sample takes most of; the
    # scarcest comes last in each class and evens out what the others left. Exponents, unlike logarithms, are exact on every machine.
    phases = 3 * (-np.frexp(sizes)[1].astype(np.int64) // 2) + (kinds - main - 1) % 3
    order = np.lexsort((-largest, phases))
    lengths, phases = lengths.take(order, axis=1), phases[order]
    loads, dealt = np.zeros((3, num_rows), dtype=np.int64), np.full(len(order), UNFIT, dtype=np.int64)
    borders = [0, *(np.flatnonzero(np.diff(phases)) + 1).tolist(), len(order)]
    for start, end in itertools.pairwise(borders):
        resource = (int(phases[start]) + main + 1) % 3
        for samples, rows in _phase(lengths[:, start:end], loads, limits, resource):
            dealt[start + samples] = rows
    left = np.flatnonzero(dealt == UNFIT)
    if left.size:
        dealt[left] = _best_fit(lengths[:, left], loads, capacity, main)
    if np.bincount(dealt).min() == 0:
        dealt = np.unique(dealt, return_inverse=True)[1]
    packed = np.empty_like(dealt)
    packed[order] = dealt
    return packed


def _phase(lengths: np.ndarray, loads: np.ndarray, limits: np.ndarray, resource: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Deal out one phase, many samples at a time; rows that the next sample does not fit take no more part in it.

    Args:
        lengths: int64[3, n], largest first in `resource`.
        loads: int64[3, R], what rows hold; updated.
        limits: int64[3, 1], what a row can hold.
        resource: What is evened out.

    Yields:
        Samples that were placed, and their rows.
    """
    samples, is_open = np.arange(lengths.shape[1]), _with_room(loads, lengths, limits)
    while samples.size and is_open.any():
        open_rows = np.flatnonzero(is_open)
        load = loads[resource].take(open_rows)
        least = load.argsort(kind="stable")[: samples.size]
        load = load.take(least)
        filled = np.minimum.accumulate(load + lengths[resource, : least.size])
        # As far as one after the other would choose the same rows: until one just filled has less than the next in line.
        count = 1 + int(np.count_nonzero(load[1:] <= filled[:-1]))
        rows = open_rows.take(least[:count])
        sums = loads.take(rows, axis=1) + lengths[:, :count]
        fits = (sums <= limits).all(axis=0)
        if fits.all():
            loads[:, rows] = sums
            yield samples[:count], rows
            samples, lengths = samples[count:], lengths[:, count:]
            continue
        loads[:, rows[fits]] = sums[:, fits]
        yield samples[:count][fits], rows[fits]
        waits = np.ones(samples.size, dtype=np.bool_)
        waits[:count] = ~fits
        samples, lengths = samples[waits], lengths[:, waits]
        is_open[rows[~fits]] = False
        is_open &= _with_room(loads, lengths, limits)


def _with_room(loads: np.ndarray, lengths: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """bool[R], True where a row could hold a sample that is as small as the smallest in everything."""
    return (loads + lengths.min(axis=1, keepdims=True) <= limits).all(axis=0)


def _best_fit(lengths: np.ndarray, loads: np.ndarray, capacity: tuple[int, int, int], main: int) -> np.ndarray:
    """Place samples one by one into the row that each fills best in the resource `main`; a new row where none holds it.

    Open rows are one sorted list of integers, free space above row number, so that the search and both updates run in C.

    Args:
        lengths: int64[3, n].
        loads: int64[3, R], what the first rows hold already.
        capacity: What a row holds.
        main: The resource that is filled best; the other two must fit as well.

    Returns:
        int64[n], row numbers; rows from R on are new.
    """
    first, second = (axis for axis in range(3) if axis != main)
    order = np.argsort(-lengths[main], kind="stable")
    shift = (lengths.shape[1] + loads.shape[1]).bit_length()
    mask = (1 << shift) - 1
    free_first, free_second = (capacity[first] - loads[first]).tolist(), (capacity[second] - loads[second]).tolist()
    open_rows = sorted((free << shift) | row for row, free in enumerate((capacity[main] - loads[main]).tolist()))
    chosen: list[int] = []
    for need, need_first, need_second in zip(*(lengths[axis, order].tolist() for axis in (main, first, second)), strict=True):
        place, end = bisect_left(open_rows, need << shift), len(open_rows)
        while place < end:
            entry = open_rows[place]
            row = entry & mask
            if need_first <= free_first[row] and need_second <= free_second[row]:
                del open_rows[place]
                break
            place += 1
        else:
            row = len(free_first)
            entry = capacity[main] << shift | row
            free_first.append(capacity[first])
            free_second.append(capacity[second])
        entry -= need << shift
        free_first[row] -= need_first
        free_second[row] -= need_second
        insort(open_rows, entry, 0, place)
        chosen.append(row)
    rows = np.empty(len(order), dtype=np.int64)
    rows[order] = chosen
    return rows
