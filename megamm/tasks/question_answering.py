"""Questions about a picture, a sound or a text, counting among them: the answer is a word, a number or a phrase."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.bootstrap import mean_of
from megamm.metrics.counting import absolute_errors, constant_absolute_error
from megamm.metrics.text import constant_exact_match, exact_matches
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task


def _parse(reply: Reply) -> str:
    return reply.text.strip()


def _figures(predictions: Sequence[str], references: Sequence[str]) -> list[Figure]:
    wanted = [[one] for one in references]
    figures = [Figure("exact_match", mean_of(exact_matches(predictions, wanted)), constant_exact_match(wanted))]
    counts = [_count(one) for one in references]
    if all(count is not None for count in counts):
        errors = absolute_errors([_count(one) for one in predictions], [count or 0 for count in counts])
        figures.append(Figure("mean_absolute_error", mean_of(errors), constant_absolute_error([count or 0 for count in counts])))
    return figures


def _count(answer: str) -> float | None:
    """The number that an answer is; None for anything else."""
    return float(answer) if answer.isascii() and answer.isdigit() else None


TASK = Task("question_answering", "What is the answer?", _parse, _figures)
