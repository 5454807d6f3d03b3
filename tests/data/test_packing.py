"""Packing: no capacity exceeded, nothing lost, and full rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megamm.data.packing import UNFIT, pack

SAMPLES = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 60), st.integers(0, 60)), max_size=80)
CAPACITY = st.tuples(st.integers(1, 100), st.integers(1, 50), st.integers(1, 50))


def as_lengths(samples) -> np.ndarray:
    return np.array(samples, dtype=np.int32).reshape(-1, 3)


@given(SAMPLES, CAPACITY)
def test_no_capacity_is_exceeded_and_nothing_that_fits_is_left_out(samples, capacity):
    lengths = as_lengths(samples)
    rows = pack(lengths, capacity)
    fits = (lengths <= capacity).all(axis=1) & (lengths[:, 0] > 0)
    assert np.array_equal(rows != UNFIT, fits)
    assert set(rows[fits].tolist()) == set(range(rows.max(initial=-1) + 1))
    for row in range(rows.max(initial=-1) + 1):
        assert (lengths[rows == row].sum(axis=0) <= capacity).all()


@given(SAMPLES, CAPACITY)
def test_two_rows_never_could_have_been_one(samples, capacity):
    """Any fit leaves no two rows that fit into one: best fit would have put the later one's items into the earlier."""
    lengths = as_lengths(samples)[:, :1] * [1, 0, 0]
    rows = pack(lengths, capacity)
    loads = sorted(lengths[rows == row, 0].sum() for row in range(rows.max(initial=-1) + 1))
    assert len(loads) < 2 or loads[0] + loads[1] > capacity[0]


def test_rows_are_full():
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(8192) < 0.3, rng.integers(1000, 6000, 8192), rng.integers(20, 200, 8192))
    patches = np.where(rng.random(8192) < 0.5, 256, 0)
    lengths = np.stack([tokens + patches, patches, np.zeros(8192, int)], axis=1)
    num_rows = sum(pack(lengths[start : start + 2048], (8192, 4096, 12000)).max() + 1 for start in range(0, 8192, 2048))
    assert lengths[:, 0].sum() / (num_rows * 8192) >= 0.98


def test_the_scarce_resource_is_packed_first():
    """Pictures fill the vision tower's capacity long before the tokens': rows must be full of patches then."""
    lengths = as_lengths([(10, 60, 0), (10, 40, 0)] * 10)
    assert pack(lengths, (1000, 100, 100)).max() + 1 == 10


def test_an_empty_window_has_no_rows():
    assert pack(as_lengths([]), (1, 1, 1)).tolist() == []
    assert pack(as_lengths([(0, 0, 0), (5, 0, 0)]), (4, 1, 1)).tolist() == [UNFIT, UNFIT]
