"""Translation: the answer is the same text in another language."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.bootstrap import mean_of
from megamm.metrics.text import bleu_statistic, chrf_statistic, exact_matches
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task


def _parse(reply: Reply) -> str:
    return " ".join(reply.text.split())


def _figures(predictions: Sequence[str], references: Sequence[str]) -> list[Figure]:
    wanted = [[one] for one in references]
    return [
        # Characters serve languages that write no white space, which BLEU's words do not.
        Figure("chrf", chrf_statistic(predictions, wanted)),
        Figure("bleu", bleu_statistic(predictions, wanted)),
        Figure("exact_match", mean_of(exact_matches(predictions, wanted))),
    ]


TASK = Task("translation", "Translate this.", _parse, _figures)
