import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.core.errors import DataError
from megamm.metrics.classes import ClassScore
from megamm.metrics.label_sets import constant_macro_f1, constant_micro_f1, label_set_scores, macro_f1_statistic, micro_f1_statistic

SETS = st.lists(st.tuples(st.frozensets(st.sampled_from("abcx")), st.frozensets(st.sampled_from("abc"))), min_size=1, max_size=20).filter(
    lambda pairs: any(wanted for _, wanted in pairs)
)


def test_macro_and_micro_f1_of_a_counted_example():
    references = [{"joy", "pride"}, {"joy"}, set()]
    predictions = [{"joy"}, {"anger"}, {"joy"}]
    # joy: one found, one missed, one false; pride: missed; anger: false, with no class of its own.
    scores = label_set_scores(predictions, references)
    assert scores.macro_f1 == pytest.approx((2 / 4 + 0) / 2)
    assert scores.micro_f1 == pytest.approx(2 * 1 / (3 + 3))
    assert scores.classes == (
        ClassScore("joy", precision=0.5, recall=0.5, f1=0.5, num_references=2, num_answers=2),
        ClassScore("pride", precision=None, recall=0.0, f1=0.0, num_references=1, num_answers=0),
    )


def test_a_single_label_is_the_label_and_not_its_absence():
    scores = label_set_scores([{"a"}, {"a"}, set()], [{"a"}, set(), set()])
    assert scores.macro_f1 == scores.micro_f1 == pytest.approx(2 / 3)


def test_nothing_answered_scores_nothing():
    scores = label_set_scores([set(), set()], [{"a"}, {"b"}])
    assert (scores.macro_f1, scores.micro_f1) == (0, 0)


@settings(max_examples=20, deadline=None)
@given(SETS)
def test_scores_are_those_of_the_counts(pairs):
    predictions, references = zip(*pairs, strict=True)
    scores = label_set_scores(predictions, references)
    f1 = {}
    for label in set().union(*references):
        found = sum(label in given and label in wanted for given, wanted in pairs)
        f1[label] = 2 * found / sum((label in given) + (label in wanted) for given, wanted in pairs)
    assert {row.label: row.f1 for row in scores.classes} == pytest.approx(f1)
    assert scores.macro_f1 == pytest.approx(sum(f1.values()) / len(f1))
    found = sum(len(given & wanted) for given, wanted in pairs)
    assert scores.micro_f1 == pytest.approx(2 * found / sum(len(given) + len(wanted) for given, wanted in pairs))


@settings(max_examples=20, deadline=None)
@given(SETS)
def test_no_constant_set_beats_the_best_one(pairs):
    references = [wanted for _, wanted in pairs]
    for answer in ({"a"}, {"b"}, {"a", "b"}, {"a", "b", "c"}, set().union(*references)):
        scores = label_set_scores([answer] * len(references), references)
        assert scores.macro_f1 <= constant_macro_f1(references) + 1e-9
        assert scores.micro_f1 <= constant_micro_f1(references) + 1e-9
    everything = label_set_scores([set().union(*references)] * len(references), references)
    assert everything.macro_f1 == pytest.approx(constant_macro_f1(references))


def test_references_without_any_label_are_refused():
    with pytest.raises(DataError, match="none of 2 reference label sets holds a label"):
        label_set_scores([{"a"}, {"a"}], [set(), set()])


@settings(max_examples=20, deadline=None)
@given(SETS, st.data())
def test_statistics_are_the_scores_of_their_selection(pairs, data):
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=8))
    predictions, references = zip(*pairs, strict=True)
    found = [statistic(predictions, references)(np.array(chosen)) for statistic in (macro_f1_statistic, micro_f1_statistic)]
    if any(references[index] for index in chosen):
        scores = label_set_scores([predictions[index] for index in chosen], [references[index] for index in chosen])
        assert found == pytest.approx([scores.macro_f1, scores.micro_f1])
    else:
        assert all(map(math.isnan, found))
