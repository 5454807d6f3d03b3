"""Packing: no capacity exceeded, nothing lost, and full rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megamm.data.planning.packing import UNFIT, pack

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
def test_rows_are_more_than_half_full(samples, capacity):
    """In one resource, no order of samples makes any fit open more rows than twice what the samples need."""
    lengths = as_lengths(samples)[:, :1] * [1, 0, 0]
    rows = pack(lengths, capacity)
    assert (rows.max(initial=-1) + 1) * capacity[0] <= 2 * lengths[rows != UNFIT].sum() + capacity[0]


def test_rows_are_full():
    """Long documents among short ones, half of them with a picture: 0.9866 by best fit alone."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(8192) < 0.3, rng.integers(1000, 6000, 8192), rng.integers(20, 200, 8192))
    patches = np.where(rng.random(8192) < 0.5, 256, 0)
    lengths = np.stack([tokens + patches, patches, np.zeros(8192, int)], axis=1)
    assert fill(lengths, (8192, 4096, 12000)) >= 0.995


def test_two_scarce_resources_are_filled_together():
    """Texts and pictures that need tokens and patches in the same proportion as a row has them: 0.85 by best fit alone."""
    rng = np.random.default_rng(0)
    patches = np.where(rng.random(8192) < 0.5, rng.integers(32, 257, 8192), 0)
    tokens = np.where(patches > 0, patches + rng.integers(20, 80, 8192), np.clip(rng.lognormal(5.0, 0.8, 8192), 16, 4096).astype(int))
    lengths = np.stack([tokens, patches, 0 * tokens], axis=1)
    assert fill(lengths, (4096, round(4096 * patches.sum() / tokens.sum() * 1.03), 1)) >= 0.98


def fill(lengths: np.ndarray, capacity: tuple[int, int, int]) -> float:
    """Share of the token capacity that is used, packed in windows of 2048."""
    num_rows = sum(pack(lengths[start : start + 2048], capacity).max() + 1 for start in range(0, len(lengths), 2048))
    return lengths[:, 0].sum() / (num_rows * capacity[0])


def test_where_large_samples_must_match_best_fit_decides():
    """Three or four samples a row, which dealing out evenly would leave three."""
    tokens = np.random.default_rng(0).integers(400, 700, 2048)
    assert fill(np.stack([tokens, 0 * tokens, 0 * tokens], axis=1), (2048, 1, 1)) >= 0.92


def test_rows_hold_every_kind_of_sample():
    """Three tasks of different lengths: the task shares of a row vary less than if its samples were drawn at random."""
    rng = np.random.default_rng(0)
    tasks = rng.integers(0, 3, 2048)
    tokens = np.choose(tasks, [rng.integers(28, 34, 2048), rng.integers(16, 24, 2048), rng.integers(60, 128, 2048)])
    lengths = np.stack([tokens, np.where(tasks == 0, 16, 0), np.where(tasks == 1, rng.integers(40, 110, 2048), 0)], axis=1)
    rows = pack(lengths, (512, 512, 2000))
    counts = np.stack([np.bincount(rows, weights=tasks == task) for task in range(3)])
    sizes = counts.sum(axis=0)
    shares = np.bincount(tasks)[:, None] / 2048
    variance = ((counts / sizes - shares) ** 2).mean(axis=1)
    assert (variance < (shares[:, 0] * (1 - shares[:, 0]) * (1 / sizes).mean())).all()


def test_the_scarce_resource_is_packed_first():
    """Pictures fill the vision tower's capacity long before the tokens': rows must be full of patches then."""
    lengths = as_lengths([(10, 60, 0), (10, 40, 0)] * 10)
    assert pack(lengths, (1000, 100, 100)).max() + 1 == 10


def test_an_empty_window_has_no_rows():
    assert pack(as_lengths([]), (1, 1, 1)).tolist() == []
    assert pack(as_lengths([(0, 0, 0), (5, 0, 0)]), (4, 1, 1)).tolist() == [UNFIT, UNFIT]
