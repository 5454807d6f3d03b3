"""Classification of pictures, sounds or texts: the answer is the label's text."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.classes import accuracy, macro_recall, majority_share
from megamm.tasks.reply import Reply
from megamm.tasks.task import Task


def _parse(reply: Reply) -> str:
    return reply.text.strip()


def _metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {"accuracy": accuracy(predictions, references), "macro_recall": macro_recall(predictions, references)}


TASK = Task("classification", "What is this?", _parse, _metrics, majority_share)
