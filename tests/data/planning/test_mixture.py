"""The mixture: never further than one sample from the exact shares, and seekable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.errors import ConfigError
from megamm.data.planning.mixture import MAX_PERIOD, Mixture, integer_weights

WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any).map(tuple)
THREE_WEIGHTS = st.tuples(*[st.integers(0, 40)] * 3).filter(any)


@given(WEIGHTS)
def test_counts_stay_within_one_of_the_exact_share(weights):
    num_positions = 2 * sum(weights) + 1
    datasets, _ = Mixture.start(weights).locate(np.arange(num_positions))
    counts = np.cumsum(datasets[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, num_positions + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - exact).max() < 1


@given(st.lists(THREE_WEIGHTS, min_size=1, max_size=4), st.data())
def test_each_dataset_is_read_in_order_without_gaps_across_changes(history, data):
    mixture, start = Mixture.start(history[0]), 0
    for weights in history[1:]:
        start += data.draw(st.integers(0, 100))
        mixture = mixture.changed(weights, start)
    datasets, places = mixture.locate(np.arange(start + 100))
    for dataset in range(3):
        found = places[datasets == dataset]
        assert np.array_equal(found, np.arange(len(found)))


@given(st.lists(THREE_WEIGHTS, min_size=2, max_size=4), st.data())
def test_seeking_equals_walking(history, data):
    mixture = Mixture.start(history[0])
    for number, weights in enumerate(history[1:]):
        mixture = mixture.changed(weights, (number + 1) * 50)
    low = data.draw(st.integers(0, 300))
    high = data.draw(st.integers(low, 320))
    for whole, part in zip(mixture.locate(np.arange(320)), mixture.locate(np.arange(low, high)), strict=True):
        assert np.array_equal(whole[low:high], part)


def test_a_change_replaces_one_at_the_same_position_and_keeps_the_past():
    mixture = Mixture.start((1, 1)).changed((3, 1), 10)
    assert mixture.changed((1, 3), 10) == Mixture.start((1, 1)).changed((1, 3), 10)
    with pytest.raises(ConfigError, match="changed at 10 already"):
        mixture.changed((1, 1), 9)


def test_far_positions_cost_nothing():
    datasets, places = Mixture.start((2, 1)).locate(np.arange(10**15, 10**15 + 3))
    assert sorted(datasets.tolist()) == [0, 0, 1]
    assert places[datasets == 1][0] == 10**15 // 3


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0], (1,)),
        ([0.1, 0.3], (1, 3)),
        ([1.0, 0.25, 0.5], (4, 1, 2)),
        ([2.0, 4.0], (1, 2)),
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([0.0, 0.5], (0, 1)),
    ],
)
def test_weights_become_the_smallest_integers(weights, expected):
    assert integer_weights(weights) == expected


def test_awkward_weights_are_rounded_to_a_bounded_period():
    numbers = integer_weights([0.123456789, 1e-9, 3.14159265358979])
    assert sum(numbers) <= MAX_PERIOD + 1 and numbers[1] == 1
    assert numbers[2] / numbers[0] == pytest.approx(3.14159265358979 / 0.123456789, rel=1e-3)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan")], [float("inf")]])
def test_useless_weights_are_refused(weights):
    with pytest.raises(ConfigError, match="draw nothing"):
        integer_weights(weights)
