"""Classification of pictures or texts: the answer is the label's text."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.bootstrap import mean_of, resampled
from megamm.metrics.classes import class_scores, constant_macro_f1, constant_macro_recall, correct, macro_recall, majority_share
from megamm.metrics.label_sets import macro_f1_statistic
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task


def parse_label(reply: Reply) -> str:
    """The label that an answer names."""
    return reply.text.strip()


def label_figures(predictions: Sequence[str], references: Sequence[str]) -> list[Figure]:
    """Accuracy, and recall and F1 as means over classes, where a rare one counts as much as a common one."""
    given, wanted = [frozenset({one}) for one in predictions], [frozenset({one}) for one in references]
    return [
        Figure("accuracy", mean_of(correct(predictions, references)), majority_share(references)),
        Figure("macro_recall", resampled(macro_recall, predictions, references), constant_macro_recall(references)),
        Figure("macro_f1", macro_f1_statistic(given, wanted), constant_macro_f1(references)),
    ]


TASK = Task("classification", "What is this?", parse_label, label_figures, label=str, classes=class_scores)
