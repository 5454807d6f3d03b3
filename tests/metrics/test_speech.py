import pytest

from megamm.core.errors import DataError
from megamm.metrics.speech import character_edits, error_rates, word_edits


def test_error_rates_of_a_counted_example():
    # One of three words is lost; of "a b" and "c" two of four characters are.
    rates = error_rates(["a", "c"], ["a b", "c"])
    assert rates == {"word_error_rate": pytest.approx(1 / 3), "character_error_rate": pytest.approx(2 / 4)}


def test_edits_are_those_of_each_sample():
    counted = word_edits(["one two", "", "three four five"], ["one  two", "one two", "four"])
    assert counted.edits.tolist() == [0, 2, 2]
    assert counted.lengths.tolist() == [2, 2, 1]
    assert counted.rate == pytest.approx(4 / 5)


def test_more_said_than_there_is_goes_above_one():
    assert error_rates(["a b c"], ["x"])["word_error_rate"] == 3


def test_chinese_is_counted_in_characters():
    counted = character_edits(["你们好"], ["你好吗"])
    assert (counted.edits.tolist(), counted.lengths.tolist()) == ([2], [3])


def test_composed_and_decomposed_characters_are_the_same():
    assert error_rates(["cafe\u0301"], ["caf\u00e9"]) == {"word_error_rate": 0, "character_error_rate": 0}


def test_a_blank_reference_is_named():
    with pytest.raises(DataError, match="reference 1 of 2 is blank"):
        error_rates(["a", "b"], ["a", " "])


def test_nothing_to_judge_is_refused():
    with pytest.raises(DataError, match="0 predictions for 0 references"):
        error_rates([], [])
