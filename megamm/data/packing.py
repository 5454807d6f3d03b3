"""Packing samples into rows: best fit, largest first, with a capacity for tokens and for each tower's input."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

UNFIT = -1


def pack(lengths: np.ndarray, capacity: tuple[int, int, int]) -> np.ndarray:
    """Assign the samples of a window to rows.

    Samples are placed from the largest down, each into the row that it fills best. "Large" and "best" are meant in the
    resource that the window needs most of, relative to its capacity; the other two must fit as well.

    Args:
        lengths: int[n, 3], tokens, patches and frames of each sample.
        capacity: Tokens, patches and frames that a row holds.

    Returns:
        int64[n], the row of each sample, numbered from 0 without gaps; `UNFIT` for samples without tokens and for those
        that no row could hold.
    """
    rows = np.full(len(lengths), UNFIT, dtype=np.int64)
    fits = np.flatnonzero((lengths <= capacity).all(axis=1) & (lengths[:, 0] > 0))
    if not fits.size:
        return rows
    lengths = lengths[fits]
    main = int(np.argmax(lengths.sum(axis=0) / np.array(capacity)))
    first, second = (axis for axis in range(3) if axis != main)
    order = np.lexsort((-lengths[:, 0], -lengths[:, main]))
    columns = (lengths[order, axis].tolist() for axis in (main, first, second))
    rows[fits[order]] = _best_fit(*columns, capacity=(capacity[main], capacity[first], capacity[second]))
    return rows


def _best_fit(mains: list[int], firsts: list[int], seconds: list[int], *, capacity: tuple[int, int, int]) -> list[int]:
    """Row of each item; items come largest first.

    Open rows are one sorted list of integers, free space above row number, so that the search and both updates run in C.
    """
    shift = len(mains).bit_length()
    mask = (1 << shift) - 1
    least = mains[-1] << shift
    open_rows: list[int] = []
    free_first: list[int] = []
    free_second: list[int] = []
    chosen: list[int] = []
    for main, first, second in zip(mains, firsts, seconds, strict=True):
        place, end = bisect_left(open_rows, main << shift), len(open_rows)
        while place < end:
            entry = open_rows[place]
            row = entry & mask
            if first <= free_first[row] and second <= free_second[row]:
                del open_rows[place]
                break
            place += 1
        else:
            row = len(free_first)
            entry = capacity[0] << shift | row
            free_first.append(capacity[1])
            free_second.append(capacity[2])
        entry -= main << shift
        free_first[row] -= first
        free_second[row] -= second
        if entry >= least:
            insort(open_rows, entry, 0, place)
        chosen.append(row)
    return chosen
