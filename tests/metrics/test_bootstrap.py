import math
import time

import numpy as np
import pytest

from megamm.core.errors import DataError
from megamm.metrics.bootstrap import Interval, interval, mean_of, ratio_of, resampled
from megamm.metrics.classes import macro_recall


def test_an_interval_of_a_share_is_that_of_the_binomial_distribution():
    right = np.arange(2000) < 1600
    found = interval(mean_of(right), len(right))
    # Normal approximation; a quantile of 1000 draws strays by about a twentieth of its width.
    half = 1.96 * math.sqrt(0.8 * 0.2 / 2000)
    assert found.low == pytest.approx(0.8 - half, abs=half / 3)
    assert found.high == pytest.approx(0.8 + half, abs=half / 3)
    assert (found.level, found.num_resamples) == (0.95, 1000)


def test_the_same_seed_gives_the_same_interval_and_another_one_does_not():
    statistic = mean_of(np.arange(50))
    assert interval(statistic, 50, seed=1) == interval(statistic, 50, seed=1)
    assert interval(statistic, 50, seed=1) != interval(statistic, 50, seed=2)


def test_a_higher_level_is_a_wider_interval():
    statistic = mean_of(np.arange(50))
    narrow, wide = interval(statistic, 50, level=0.5), interval(statistic, 50, level=0.99)
    assert wide.low < narrow.low < 24.5 < narrow.high < wide.high


def test_all_right_has_no_width():
    assert interval(mean_of(np.ones(10)), 10) == Interval(1, 1, 0.95, 1000)


def test_ratios_are_of_sums():
    assert ratio_of([1, 0, 3], [2, 1, 4])(np.array([0, 2, 2])) == pytest.approx(7 / 10)
    assert math.isnan(ratio_of([0, 1], [0, 1])(np.array([0, 0])))


def test_any_metric_can_be_resampled():
    predictions, references = ["a", "b", "b"], ["a", "a", "b"]
    statistic = resampled(macro_recall, predictions, references)
    assert statistic(np.array([0, 1, 2])) == macro_recall(predictions, references)
    assert statistic(np.array([1, 1, 2])) == 0.5
    with pytest.raises(DataError, match="1 predictions for 2 references"):
        resampled(macro_recall, ["a"], ["a", "b"])


def test_resamples_in_which_the_metric_is_undefined_are_left_out_and_counted():
    found = interval(ratio_of([1, 0], [1, 0]), 2, num_resamples=400)
    assert (found.low, found.high) == (1, 1)
    assert 250 < found.num_resamples < 350
    with pytest.raises(DataError, match="undefined in each of 5 resamples of 2 samples"):
        interval(ratio_of([0, 0], [0, 0]), 2, num_resamples=5)


def test_infinite_values_stay_infinite():
    found = interval(lambda indices: math.inf if indices[0] else 1.0, 2)
    assert (found.low, found.high) == (1, math.inf)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_samples": 5, "num_resamples": 0}, {"num_samples": 5, "level": 1.0}])
def test_what_gives_no_interval_is_refused(options):
    with pytest.raises(DataError, match="gives no interval"):
        interval(mean_of(np.ones(5)), **options)


def test_accuracy_of_two_thousand_samples_is_cheap():
    right = np.arange(2000) % 3 > 0
    start = time.process_time()
    interval(mean_of(right), len(right))
    assert time.process_time() - start < 0.5
