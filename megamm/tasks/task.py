"""What a task is: how it is asked, how an answer is read, how answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megamm.tasks.reply import Reply


@dataclass(frozen=True, slots=True)
class Task:
    """One task of the chat language.

    Attributes:
        name: As samples name it.
        prompt: An instruction to ask it with, where the data brings none.
        parse: Takes of a model's or a stored answer what the task asks for.
        metrics: Judges predictions against references, both as `parse` gives them.
        chance: What the best guess without looking scores on these references in the first of the metrics; None where that means nothing.
    """

    name: str
    prompt: str
    parse: Callable[[Reply], Any]
    metrics: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
    chance: Callable[[Sequence[Any]], float | None]
