"""Which elements of a flattened tensor each rank holds: ZeRO-3's split, as arithmetic, and any other one, as a table."""

from __future__ import annotations

from collections.abc import Sequence


def slice_bounds(num_elements: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """First and one past the last element of a rank's slice; equal for a rank beyond the end.

    A tensor is padded to a multiple of the ranks and cut into equal slices; the padding is left out here.

    Source: DeepSpeed, `zero.Init._partition_param`.
    """
    size = -(-num_elements // num_ranks)
    start = min(size * rank, num_elements)
    return start, min(start + size, num_elements)


def pieces(start: int, stop: int, *, num_elements: int, num_ranks: int) -> list[tuple[int, int, int]]:
    """Where the elements [start, stop) lie in a state of `num_ranks` ranks.

    Returns:
        (rank, first, last) in order: elements [first, last) of that rank's slice. Together they are [start, stop).
    """
    size = -(-num_elements // num_ranks)
    found = []
    while start < stop:
        rank = start // size
        rank_start, rank_stop = slice_bounds(num_elements, num_ranks, rank)
        end = min(stop, rank_stop)
        found.append((rank, start - rank_start, end - rank_start))
        start = end
    return found


def pieces_of(start: int, stop: int, slices: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """The same where ranks hold uneven slices.

    Args:
        start: First element.
        stop: One past the last.
        slices: (rank, first, one past the last element) of every rank that holds some, in order; together they are the tensor.
    """
    overlaps = [(rank, max(start, first), min(stop, last), first) for rank, first, last in slices]
    return [(rank, begin - first, end - first) for rank, begin, end, first in overlaps if begin < end]
