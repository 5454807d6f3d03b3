"""What a task is: how it is asked, how an answer is read, how answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megamm.metrics.bootstrap import Statistic
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
        has_classes: Whether a prediction is one label of few, so that a confusion matrix means something.
    """

    name: str
    prompt: str
    parse: Callable[[Reply], Any]
    figures: Callable[[Sequence[Any], Sequence[Any]], list[Figure]]
    has_classes: bool = False
