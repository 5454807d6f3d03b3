import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from megamm.core.errors import DataError
from megamm.metrics.ranking import most_popular, ranking_metrics, ranking_scores


def test_metrics_of_a_counted_example():
    rankings = [["x", "a", "b", "y"], ["x", "y", "z", "a"]]
    relevant = [{"a", "b", "c"}, {"a"}]
    metrics = ranking_metrics(rankings, relevant, (1, 3, 4))
    discount = {rank: 1 / math.log2(rank + 1) for rank in range(1, 5)}
    best = discount[1] + discount[2] + discount[3]
    assert metrics == pytest.approx(
        {
            "hit_rate_at_1": 0,
            "recall_at_1": 0,
            "ndcg_at_1": 0,
            "hit_rate_at_3": 1 / 2,
            "recall_at_3": (2 / 3 + 0) / 2,
            "ndcg_at_3": (discount[2] + discount[3]) / best / 2,
            "hit_rate_at_4": 1,
            "recall_at_4": (2 / 3 + 1) / 2,
            "ndcg_at_4": ((discount[2] + discount[3]) / best + discount[4]) / 2,
        }
    )


def test_more_relevant_items_than_places_can_still_have_all_the_gain():
    scores = ranking_scores([["a", "b"]], [{"a", "b", "c", "d"}], (2,))[2]
    assert (scores.hits[0], scores.recalls[0], scores.gains[0]) == (1, 0.5, pytest.approx(1))


def test_short_and_empty_rankings_miss_the_rest():
    scores = ranking_scores([["a"], []], [{"a", "b"}, {"a"}], (10,))[10]
    assert scores.hits.tolist() == [1, 0]
    assert scores.recalls.tolist() == [0.5, 0]
    assert scores.gains[1] == 0


@settings(max_examples=30, deadline=None)
@given(st.permutations(list(range(12))), st.frozensets(st.integers(0, 11), min_size=1), st.integers(1, 12))
def test_gain_equals_scikit_learn(ranking, relevant, cutoff):
    truth = np.array([[item in relevant for item in range(12)]], dtype=float)
    scores = np.empty((1, 12))
    scores[0, list(ranking)] = -np.arange(12)
    gained = ranking_scores([ranking], [relevant], (cutoff,))[cutoff].gains[0]
    assert gained == pytest.approx(ndcg_score(truth, scores, k=cutoff))


def test_the_popular_ranking_breaks_ties_by_id():
    assert most_popular([{"b", "c"}, {"a", "c"}, {"c"}]) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("rankings", "relevant", "cutoffs", "words"),
    [
        ([["a"]], [set()], (1,), "user 0 has no relevant item"),
        ([["a"], ["a", "b", "a"]], [{"a"}, {"a"}], (1,), "ranking of user 1 lists 'a' twice"),
        ([["a"]], [{"a"}], (0,), r"cutoffs=\[0\]"),
        ([["a"]], [], (1,), "1 predictions for 0 references"),
    ],
)
def test_what_cannot_be_ranked_is_named(rankings, relevant, cutoffs, words):
    with pytest.raises(DataError, match=words):
        ranking_scores(rankings, relevant, cutoffs)
