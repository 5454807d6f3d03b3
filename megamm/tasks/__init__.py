"""Tasks and the chat language that they share. A new task is one file here and one line in the table. Imports no torch."""

from megamm.tasks import classification, speech_recognition, text
from megamm.tasks.task import Task

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (classification, speech_recognition, text)}

__all__ = ["TASKS", "Task"]
