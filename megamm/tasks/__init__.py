"""Tasks and the chat language that they share. A new task is one file here and one line in the table. Imports no torch."""

from megamm.tasks import (
    audio_classification,
    captioning,
    classification,
    detection,
    matching,
    question_answering,
    recommendation,
    segmentation,
    sentiment,
    speech_recognition,
    text,
    translation,
)
from megamm.tasks.task import Figure, Task

_ALL = (
    classification,
    detection,
    segmentation,
    captioning,
    question_answering,
    speech_recognition,
    audio_classification,
    sentiment,
    translation,
    recommendation,
    matching,
    text,
)

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _ALL}

__all__ = ["TASKS", "Figure", "Task"]
