import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.core.errors import DataError
from megamm.metrics.counting import absolute_errors, constant_absolute_error, exact_share, mean_absolute_error


def test_counts_of_a_counted_example():
    predictions, references = [3, 0, None, 7], [3, 2, 4, 6]
    assert absolute_errors(predictions, references).tolist() == [0, 2, 4, 1]
    assert mean_absolute_error(predictions, references) == 7 / 4
    assert exact_share(predictions, references) == 1 / 4


def test_an_answer_that_is_no_number_is_never_exact():
    assert exact_share([None], [0]) == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=20), st.integers(0, 20))
def test_no_constant_number_beats_the_median(references, answer):
    assert constant_absolute_error(references) <= mean_absolute_error([answer] * len(references), references) + 1e-9


def test_nothing_counted_is_refused():
    with pytest.raises(DataError, match="0 predictions for 0 references"):
        mean_absolute_error([], [])
