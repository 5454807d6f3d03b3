"""Classification of sounds: the answer is the label's text."""

from __future__ import annotations

from megamm.metrics.classes import class_scores
from megamm.tasks.classification import label_figures, parse_label
from megamm.tasks.task import Task

TASK = Task("audio_classification", "What do you hear?", parse_label, label_figures, label=str, classes=class_scores, media=("audio",))
