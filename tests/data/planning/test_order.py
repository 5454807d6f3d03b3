"""The keyed order: a bijection at every size, key and epoch, evaluated at a position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.data.keyed import derive_key, permute
from megamm.data.planning.order import sample_at, variants_at

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 3000), KEYS)
def test_permutation_is_bijective(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), KEYS)
def test_sizes_and_keys_may_differ_by_element(sizes, key):
    positions = np.concatenate([np.arange(size) for size in sizes])
    limits = np.repeat(np.array(sizes), sizes)
    keys = np.repeat(np.array([derive_key(key, number) for number in range(len(sizes))], dtype=np.uint64), sizes)
    expected = [permute(np.arange(size), size, derive_key(key, number)) for number, size in enumerate(sizes)]
    assert np.array_equal(permute(positions, limits, keys), np.concatenate(expected))


@given(KEYS)
def test_the_largest_range_is_served(key):
    size = 2**62
    positions = np.array([0, 1, size // 3, size - 2, size - 1])
    found = permute(positions, size, key)
    assert len(set(found.tolist())) == 5 and (found >= 0).all() and (found < size).all()
    assert np.array_equal(found, permute(positions, np.full(5, size), key))


@given(st.integers(1, 1500), st.integers(1, 100), st.integers(1, 20), KEYS, st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(num_samples, block, window, seed, epoch):
    found = sample_at(np.arange(num_samples), num_samples=num_samples, block=block, window=window, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(found), np.arange(num_samples))


@given(st.integers(1, 1500), st.integers(1, 100), st.integers(1, 20), KEYS, st.data())
def test_seeking_equals_walking(num_samples, block, window, seed, data):
    order = {"num_samples": num_samples, "block": block, "window": window, "seed": seed, "epoch": 3}
    position = data.draw(st.integers(0, num_samples - 1))
    assert sample_at(np.array([position]), **order)[0] == sample_at(np.arange(num_samples), **order)[position]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), KEYS, st.integers(0, 2**40))
def test_many_epochs_at_once_are_the_same_as_one_by_one(num_samples, block, window, seed, first):
    order = {"num_samples": num_samples, "block": block, "window": window, "seed": seed}
    positions = np.arange(num_samples)
    expected = [sample_at(positions, **order, epoch=epoch) for epoch in range(first, first + 5)]
    epochs = np.repeat(np.arange(first, first + 5, dtype=np.uint64), num_samples)
    assert np.array_equal(sample_at(np.tile(positions, 5), **order, epoch=epochs), np.concatenate(expected))


def test_blocks_stay_inside_their_window():
    """Reads are local: 128 positions touch two windows of 8 blocks at most (random samples would touch about 114 blocks)."""
    order = {"num_samples": 10_007, "block": 16, "window": 8, "seed": 1, "epoch": 0}
    found = sample_at(np.arange(10_007), **order)
    for start in range(0, 10_000, 128):
        assert len(np.unique(found[start : start + 128] // 16)) <= 17


@pytest.mark.parametrize("block", [1, 16])
def test_epochs_seeds_and_neighbours_are_unrelated(block):
    size = 20_000
    order = {"num_samples": size, "block": block, "window": 64}
    first = sample_at(np.arange(size), **order, seed=1, epoch=0)
    # A random permutation has one fixed point on average; 12 or more have a probability below 1e-9.
    assert (first == sample_at(np.arange(size), **order, seed=1, epoch=1)).sum() < 12 * block
    assert (first == sample_at(np.arange(size), **order, seed=2, epoch=0)).sum() < 12 * block
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def test_positions_are_uniform():
    """Chi-square of where each of 50 elements goes over 2000 keys: 49 x 49 degrees of freedom, so 5 sigma is 2747."""
    counts = np.zeros((50, 50))
    for key in range(2000):
        counts[np.arange(50), permute(np.arange(50), 50, derive_key(key, 1))] += 1
    assert ((counts - 40) ** 2 / 40).sum() < 2747


def test_order_is_the_same_on_every_machine():
    """A changed order would silently break every resumed run; these values were made by this code when it was first written."""
    assert permute(np.arange(8), 8, 42).tolist() == GOLDEN_PERMUTATION
    assert sample_at(np.arange(10), num_samples=1_000_000_007, block=16, window=64, seed=7, epoch=2).tolist() == GOLDEN_ORDER


GOLDEN_PERMUTATION = [5, 6, 7, 0, 2, 3, 1, 4]
GOLDEN_ORDER = [318482232, 15993326, 424303053, 580928849, 224148639, 554453686, 207626130, 332155107, 194253911, 85835855]


def test_variants_are_drawn_evenly_by_seed_and_position():
    positions = np.arange(30_000)
    drawn = variants_at(7, positions, 3)
    assert drawn.dtype == np.int64 and np.array_equal(drawn[100:200], variants_at(7, positions[100:200], 3))
    assert np.abs(np.bincount(drawn, minlength=3) / 30_000 - 1 / 3).max() < 0.02
    assert 0.3 < np.mean(drawn == variants_at(8, positions, 3)) < 0.37
    assert not variants_at(7, positions, 1).any()
