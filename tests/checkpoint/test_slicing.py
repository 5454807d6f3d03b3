import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from megamm.checkpoint.slicing import pieces, pieces_of, slice_bounds

sizes = st.integers(1, 400)
ranks = st.integers(1, 17)


@given(sizes, ranks)
def test_slices_tile_the_tensor_in_order(num_elements, num_ranks):
    bounds = [slice_bounds(num_elements, num_ranks, rank) for rank in range(num_ranks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_elements
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))


@given(sizes, ranks)
def test_every_slice_but_the_last_ones_is_full(num_elements, num_ranks):
    lengths = [stop - start for start, stop in (slice_bounds(num_elements, num_ranks, rank) for rank in range(num_ranks))]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(0 < length < lengths[0] for length in lengths) <= 1


@given(sizes, ranks, ranks)
def test_any_number_of_ranks_gets_its_slice_from_any_other(num_elements, written_by, read_by):
    tensor = torch.arange(num_elements)
    written = [tensor[slice(*slice_bounds(num_elements, written_by, rank))] for rank in range(written_by)]
    for rank in range(read_by):
        start, stop = slice_bounds(num_elements, read_by, rank)
        parts = [
            written[source][first:last] for source, first, last in pieces(start, stop, num_elements=num_elements, num_ranks=written_by)
        ]
        assert torch.equal(torch.cat([tensor[:0], *parts]), tensor[start:stop])


@given(sizes, ranks)
def test_the_writer_reads_its_own_slice_and_no_other(num_elements, num_ranks):
    for rank in range(num_ranks):
        start, stop = slice_bounds(num_elements, num_ranks, rank)
        expected = [(rank, 0, stop - start)] if stop > start else []
        assert pieces(start, stop, num_elements=num_elements, num_ranks=num_ranks) == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_uneven_slices_are_found_by_their_table(lengths, data):
    """As ZeRO-2 cuts: each rank holds some stretch, beginning at any rank."""
    tensor = torch.arange(sum(lengths))
    ends = list(itertools.accumulate(lengths))
    first_rank = data.draw(st.integers(0, 5))
    slices = [[first_rank + index, end - length, end] for index, (length, end) in enumerate(zip(lengths, ends, strict=True))]
    written = {rank: tensor[start:stop] for rank, start, stop in slices}
    start = data.draw(st.integers(0, len(tensor)))
    stop = data.draw(st.integers(start, len(tensor)))
    parts = [written[rank][first:last] for rank, first, last in pieces_of(start, stop, slices)]
    assert torch.equal(torch.cat([tensor[:0], *parts]), tensor[start:stop])
    assert all(len(part) for part in parts)
