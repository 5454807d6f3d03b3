"""Speech recognition: the answer is what was said, in words."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.classes import accuracy, majority_share
from megamm.metrics.speech import error_rates
from megamm.tasks.reply import Reply
from megamm.tasks.task import Task


def _parse(reply: Reply) -> str:
    return " ".join(reply.text.lower().split())


def _metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {"accuracy": accuracy(predictions, references), **error_rates(predictions, references)}


TASK = Task("speech_recognition", "Write down what is said.", _parse, _metrics, majority_share)
