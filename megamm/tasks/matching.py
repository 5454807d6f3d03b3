"""Do two things of one sample belong together, such as a spoken digit and a pictured one? Answers need both: each alone tells nothing."""

from __future__ import annotations

from megamm.metrics.classes import class_scores
from megamm.tasks.classification import label_figures, parse_label
from megamm.tasks.task import Task

TASK = Task("matching", "Do these belong together?", parse_label, label_figures, label=str, classes=class_scores)
