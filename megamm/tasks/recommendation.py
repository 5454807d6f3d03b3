"""Recommendation: the answer is items of a catalogue, judged as a ranking of all of them."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.bootstrap import mean_of
from megamm.metrics.ranking import RankingScores, most_popular, ranking_scores
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task

CUTOFFS = (10, 20, 50)

BASKET_END = "\n"
"""Text behind each basket of a history: what was met at once, and that something else follows."""


def _parse(reply: Reply) -> tuple[str, ...]:
    # An item that an answer names twice is recommended once.
    return tuple(dict.fromkeys(item.id for item in reply.items))


def _figures(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[Figure]:
    wanted = [frozenset(one) for one in references]
    popular = most_popular(wanted)[: max(CUTOFFS)]
    found, constant = ranking_scores(predictions, wanted, CUTOFFS), ranking_scores([popular] * len(wanted), wanted, CUTOFFS)
    return [figure for cutoff in CUTOFFS for figure in _at(cutoff, found[cutoff], constant[cutoff])]


def _at(cutoff: int, found: RankingScores, constant: RankingScores) -> list[Figure]:
    """Chance is the ranking that suits these references best of all that know no user."""
    return [
        Figure(f"recall_at_{cutoff}", mean_of(found.recalls), float(constant.recalls.mean())),
        Figure(f"ndcg_at_{cutoff}", mean_of(found.gains), float(constant.gains.mean())),
        Figure(f"hit_rate_at_{cutoff}", mean_of(found.hits), float(constant.hits.mean())),
    ]


TASK = Task("recommendation", "What comes next?", _parse, _figures, kinds=("item",))
