import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from megamm.core.errors import DataError
from megamm.metrics.classes import (
    ClassScore,
    accuracy,
    class_scores,
    confusion,
    constant_macro_f1,
    constant_macro_recall,
    correct,
    macro_f1,
    macro_recall,
    majority_share,
)

REFERENCES = ["a", "a", "a", "b"]
PREDICTIONS = ["a", "a", "b", "狗"]


def test_accuracy_and_macro_recall_of_a_counted_example():
    assert accuracy(PREDICTIONS, REFERENCES) == 0.5
    assert correct(PREDICTIONS, REFERENCES).tolist() == [True, True, False, False]
    assert macro_recall(PREDICTIONS, REFERENCES) == pytest.approx((2 / 3 + 0) / 2)


def test_scores_of_each_class_of_a_counted_example():
    assert class_scores(PREDICTIONS, REFERENCES) == (
        ClassScore("a", precision=1.0, recall=pytest.approx(2 / 3), f1=pytest.approx(2 * 2 / (2 + 3)), num_references=3, num_answers=2),
        ClassScore("b", precision=0.0, recall=0.0, f1=0.0, num_references=1, num_answers=1),
    )
    assert macro_f1(PREDICTIONS, REFERENCES) == pytest.approx(0.8 / 2)


def test_a_class_that_was_never_answered_has_no_precision():
    assert class_scores(["b", "b"], ["a", "b"])[0] == ClassScore("a", None, 0.0, 0.0, num_references=1, num_answers=0)


def test_answers_outside_the_classes_have_columns_of_their_own():
    counted = confusion([*PREDICTIONS, "Ä"], [*REFERENCES, "b"])
    assert counted.classes == ("a", "b")
    assert counted.answers == ("a", "b", "Ä", "狗")
    assert counted.counts == ((2, 1, 0, 0), (0, 0, 1, 1))


def test_all_wrong_is_zero_everywhere():
    references, predictions = ["a", "b"], ["b", "a"]
    assert accuracy(predictions, references) == macro_recall(predictions, references) == macro_f1(predictions, references) == 0


def test_the_best_constant_answer_scores_what_chance_says():
    always = ["a"] * len(REFERENCES)
    assert majority_share(REFERENCES) == accuracy(always, REFERENCES) == 0.75
    assert constant_macro_recall(REFERENCES) == macro_recall(always, REFERENCES) == 0.5
    assert constant_macro_f1(REFERENCES) == pytest.approx(macro_f1(always, REFERENCES))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcx"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_figures_follow_from_the_confusion_counts(pairs):
    predictions, references = zip(*pairs, strict=True)
    counted = confusion(predictions, references)
    assert sum(map(sum, counted.counts)) == len(pairs)
    diagonal = [row[index] for index, row in enumerate(counted.counts)]
    assert accuracy(predictions, references) == pytest.approx(sum(diagonal) / len(pairs))
    recalls = [hit / sum(row) for hit, row in zip(diagonal, counted.counts, strict=True)]
    assert [score.recall for score in class_scores(predictions, references)] == pytest.approx(recalls)
    assert macro_recall(predictions, references) == pytest.approx(sum(recalls) / len(recalls))


def test_macro_recall_equals_scikit_learn():
    references = [str(index * index % 7) for index in range(50)]
    predictions = [str(index * index % 7) if index % 3 else "0" for index in range(50)]
    assert macro_recall(predictions, references) == pytest.approx(sklearn_metrics.balanced_accuracy_score(references, predictions))
    assert macro_f1(predictions, references) == pytest.approx(sklearn_metrics.f1_score(references, predictions, average="macro"))


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
@pytest.mark.parametrize("metric", [accuracy, macro_recall, macro_f1, confusion])
def test_counts_that_do_not_match_are_refused(metric, predictions, references):
    with pytest.raises(DataError, match=f"{len(predictions)} predictions for {len(references)} references"):
        metric(predictions, references)
