"""Sentiment and emotion of a text, a voice or a face: the answer is one label or several, with commas between them."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from megamm.metrics.bootstrap import mean_of
from megamm.metrics.classes import ClassScore, correct, majority_share
from megamm.metrics.label_sets import constant_macro_f1, constant_micro_f1, label_set_scores, macro_f1_statistic, micro_f1_statistic
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task


def _parse(reply: Reply) -> frozenset[str]:
    return frozenset(label.strip() for label in reply.text.split(",") if label.strip())


def _figures(predictions: Sequence[AbstractSet[str]], references: Sequence[AbstractSet[str]]) -> list[Figure]:
    given, wanted = [frozenset(one) for one in predictions], [frozenset(one) for one in references]
    return [
        Figure("macro_f1", macro_f1_statistic(given, wanted), constant_macro_f1(wanted)),
        Figure("micro_f1", micro_f1_statistic(given, wanted), constant_micro_f1(wanted)),
        Figure("accuracy", mean_of(correct(given, wanted)), majority_share(wanted)),
    ]


def _classes(predictions: Sequence[AbstractSet[str]], references: Sequence[AbstractSet[str]]) -> Sequence[ClassScore]:
    return label_set_scores(predictions, references).classes


def _label(labels: AbstractSet[str]) -> str | None:
    return next(iter(labels)) if len(labels) == 1 else None


TASK = Task("sentiment", "Which emotions does this show?", _parse, _figures, label=_label, classes=_classes)
