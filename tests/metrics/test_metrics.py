import pytest

from megamm.core.errors import DataError
from megamm.metrics.classes import accuracy, macro_recall, majority_share
from megamm.metrics.speech import error_rates


def test_accuracy_and_macro_recall_of_a_counted_example():
    references = ["a", "a", "a", "b"]
    predictions = ["a", "a", "b", "a"]
    assert accuracy(predictions, references) == 0.5
    assert macro_recall(predictions, references) == pytest.approx((2 / 3 + 0) / 2)
    assert majority_share(references) == 0.75


def test_macro_recall_equals_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    references = [index * index % 7 for index in range(50)]
    predictions = [index * index % 7 if index % 3 else 0 for index in range(50)]
    assert macro_recall(predictions, references) == pytest.approx(sklearn_metrics.balanced_accuracy_score(references, predictions))


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_counts_that_do_not_match_are_refused(predictions, references):
    for metric in (accuracy, macro_recall):
        with pytest.raises(DataError, match=f"{len(predictions)} predictions for {len(references)} references"):
            metric(predictions, references)


def test_error_rates_of_a_counted_example():
    pytest.importorskip("jiwer")
    # One of three words is lost; of "a b" and "c" three of four characters stay.
    rates = error_rates(["a", "c"], ["a b", "c"])
    assert rates == {"word_error_rate": pytest.approx(1 / 3), "character_error_rate": pytest.approx(2 / 4)}
