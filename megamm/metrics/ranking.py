"""Recommendation over full rankings: are the items that a user went on to choose among the first K of all items?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamm.core.errors import DataError
from megamm.metrics.pairs import check_pairs


@dataclass(frozen=True, slots=True, eq=False)
class RankingScores:
    """Scores of each user at one K, float64[N] in [0, 1]; each metric is the mean of its array.

    Attributes:
        hits: 1 where one of the relevant items is among the first K (HR@K).
        recalls: Share of the relevant items among the first K (R@K); below 1 for a user with more than K of them.
        gains: Σ 1 / log2(rank + 1) over the relevant items among the first K, over what the best ranking gets (NDCG@K).
    """

    hits: NDArray[np.float64]
    recalls: NDArray[np.float64]
    gains: NDArray[np.float64]


def ranking_scores(
    rankings: Sequence[Sequence[Hashable]], relevant: Sequence[AbstractSet[Hashable]], cutoffs: Sequence[int] = (5, 10, 20)
) -> dict[int, RankingScores]:
    """Compare each user's ranking with the items that are relevant to them.

    Args:
        rankings: Ids of items, best first. A ranking that ends before K has missed what it does not list.
        relevant: The ids to be found.
        cutoffs: The K to score at.

    Raises:
        DataError: There are none, not one for each user, a user has nothing relevant, a ranking lists an item twice, or K is below 1.

    Source: Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques (2002), with binary relevance.
    """
    check_pairs(rankings, relevant)
    if not cutoffs or min(cutoffs) < 1:
        raise DataError(f"cutoffs={list(cutoffs)} rank nothing; give numbers of at least 1")
    found = [_found(index, ranking, wanted) for index, (ranking, wanted) in enumerate(zip(rankings, relevant, strict=True))]
    num_relevant = np.array([len(wanted) for wanted in relevant])
    return {cutoff: _scores(found, num_relevant, cutoff) for cutoff in cutoffs}


def ranking_metrics(
    rankings: Sequence[Sequence[Hashable]], relevant: Sequence[AbstractSet[Hashable]], cutoffs: Sequence[int] = (5, 10, 20)
) -> dict[str, float]:
    """Means over users of `ranking_scores`: `hit_rate_at_K`, `recall_at_K` and `ndcg_at_K` for each K.

    Raises:
        DataError: As `ranking_scores`.
    """
    metrics: dict[str, float] = {}
    for cutoff, scores in ranking_scores(rankings, relevant, cutoffs).items():
        metrics[f"hit_rate_at_{cutoff}"] = float(scores.hits.mean())
        metrics[f"recall_at_{cutoff}"] = float(scores.recalls.mean())
        metrics[f"ndcg_at_{cutoff}"] = float(scores.gains.mean())
    return metrics


def most_popular(relevant: Sequence[AbstractSet[str]]) -> list[str]:
    """The constant ranking: items by the number of users to whom they are relevant, equal ones by id.

    Of test references it is what a recommender that knows no user could reach at best (in recall); of training baskets it is the
    popularity baseline.
    """
    counts = Counter(item for items in relevant for item in items)
    return sorted(counts, key=lambda item: (-counts[item], item))


def _found(index: int, ranking: Sequence[Hashable], wanted: AbstractSet[Hashable]) -> NDArray[np.int64]:
    """Ranks, from 1, of what is relevant."""
    if not wanted:
        raise DataError(f"user {index} has no relevant item, so nothing can be found; leave the user out")
    if len(set(ranking)) != len(ranking):
        twice = next(item for item, count in Counter(ranking).items() if count > 1)
        raise DataError(f"the ranking of user {index} lists {twice!r} twice; list each item once, at its best rank")
    return np.array([rank for rank, item in enumerate(ranking, 1) if item in wanted], dtype=np.int64)


def _scores(found: Sequence[NDArray[np.int64]], num_relevant: NDArray[np.int64], cutoff: int) -> RankingScores:
    discounts = 1 / np.log2(np.arange(1, cutoff + 1) + 1)
    best = np.cumsum(discounts)[np.minimum(num_relevant, cutoff) - 1]
    within = [ranks[ranks <= cutoff] for ranks in found]
    num_found = np.array([len(ranks) for ranks in within])
    gained = np.array([discounts[ranks - 1].sum() for ranks in within])
    return RankingScores(hits=(num_found > 0).astype(np.float64), recalls=num_found / num_relevant, gains=gained / best)
