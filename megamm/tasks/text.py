"""Plain text documents. They have no answer to judge: their measure is the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task


def _parse(reply: Reply) -> str:
    return reply.text


def _figures(predictions: Sequence[str], references: Sequence[str]) -> list[Figure]:
    return []


TASK = Task("text", "Continue.", _parse, _figures)
