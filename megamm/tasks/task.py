"""What a task is: how it is asked, how an answer is read, how answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megamm.core.errors import DataError
from megamm.core.types import Message, Part
from megamm.metrics.bootstrap import Statistic
from megamm.metrics.classes import ClassScore
from megamm.metrics.coco import Matches
from megamm.tasks.reply import Reply


@dataclass(frozen=True, slots=True)
class Figure:
    """One way to judge answers.

    Attributes:
        name: Of the metric.
        statistic: The metric over any selection of the samples, so that slices and confidence intervals come from one computation.
        chance: What the best answer without looking scores on all of them; None where that means nothing.
        num_resamples: How many a confidence interval takes; fewer where one costs milliseconds.
    """

    name: str
    statistic: Statistic
    chance: float | None = None
    num_resamples: int = 1000


@dataclass(frozen=True, slots=True)
class Task:
    """One task of the chat language.

    Attributes:
        name: As samples name it.
        prompt: An instruction to ask it with, where the data brings none.
        parse: Takes of a model's or a stored answer what the task asks for.
        figures: Judges predictions against references, both as `parse` gives them; the first figure is the task's own.
        media: Of which a question holds at least one, such as `image`; empty where texts alone can ask.
        kinds: Types of the parts that its stored answers hold; with a model's head, the head says what they are.
        label: Of what `parse` gives the one label of few that it is, None where it is none or several: where every reference is one, a
            confusion matrix means something. None where answers are no labels.
        classes: How each class fares, of what `parse` gives; None where answers are no classes.
        match: Predicted places matched with those of the references; None where answers are no places.
    """

    name: str
    prompt: str
    parse: Callable[[Reply], Any]
    figures: Callable[[Sequence[Any], Sequence[Any]], list[Figure]]
    media: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("text", "label")
    label: Callable[[Any], str | None] | None = None
    classes: Callable[[Sequence[Any], Sequence[Any]], Sequence[ClassScore]] | None = None
    match: Callable[[Sequence[Any], Sequence[Any]], Matches] | None = None

    def check_question(self, messages: Sequence[Message]) -> None:
        """Refuse a question without what the task is about.

        Args:
            messages: Of the question; a stored answer may follow.

        Raises:
            DataError: It shows none of `media`.
        """
        if self.media and not any(part.type in self.media for message in messages for part in message.content):
            raise DataError(
                f"the question shows no {' and no '.join(self.media)}, which {self.name} is about; add one, or name another task"
            )

    def check_answer(self, parts: Sequence[Part]) -> None:
        """Refuse a stored answer that is none of this task.

        Raises:
            DataError: It holds a part of another kind, or is blank.
        """
        for part in parts:
            if part.type not in self.kinds:
                raise DataError(f"the stored answer holds a {part.type} part, and {self.name} answers with {' or '.join(self.kinds)}")
        if all(part.type in ("text", "label") for part in parts) and not any(part.text.strip() for part in parts):
            raise DataError(f"the stored answer of {self.name} is blank; leave the sample out, or give it one")
