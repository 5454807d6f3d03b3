"""Plain text documents. They have no answer to judge: their measure is the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.tasks.reply import Reply
from megamm.tasks.task import Task


def _parse(reply: Reply) -> str:
    return reply.text


def _metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {}


def _chance(references: Sequence[str]) -> None:
    return None


TASK = Task("text", "Continue.", _parse, _metrics, _chance)
