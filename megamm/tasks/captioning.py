"""Captioning: the answer is a sentence, or a name, for a picture or a sound."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.bootstrap import mean_of
from megamm.metrics.cider import cider_scores
from megamm.metrics.text import bleu_statistic, chrf_statistic, constant_exact_match, exact_matches
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task


def _parse(reply: Reply) -> str:
    return reply.text.strip()


def _figures(predictions: Sequence[str], references: Sequence[str]) -> list[Figure]:
    wanted = [[one] for one in references]
    # Which words are rare, one sample alone does not tell.
    rarity = [Figure("cider", mean_of(cider_scores(predictions, wanted)))] if len(wanted) > 1 else []
    return [
        *rarity,
        Figure("chrf", chrf_statistic(predictions, wanted)),
        Figure("bleu", bleu_statistic(predictions, wanted)),
        Figure("exact_match", mean_of(exact_matches(predictions, wanted)), constant_exact_match(wanted)),
    ]


TASK = Task("captioning", "What does this show?", _parse, _figures, media=("image", "audio"))
