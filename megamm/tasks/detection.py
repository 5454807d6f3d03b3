"""Detection: the answer is a list of labelled boxes in a picture."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.core.predictions import Box
from megamm.metrics.boxes import match_boxes
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task

_NUM_RESAMPLES = 200


def _parse(reply: Reply) -> tuple[Box, ...]:
    return reply.boxes


def _figures(predictions: Sequence[Sequence[Box]], references: Sequence[Sequence[Box]]) -> list[Figure]:
    matches = match_boxes(predictions, references)
    return [
        Figure("map50", lambda indices: matches.scores(indices).map50, num_resamples=_NUM_RESAMPLES),
        Figure("map", lambda indices: matches.scores(indices).map, num_resamples=_NUM_RESAMPLES),
        Figure("recall", lambda indices: matches.scores(indices).recall, num_resamples=_NUM_RESAMPLES),
    ]


TASK = Task("detection", "Find every object.", _parse, _figures, kinds=("boxes",), match=match_boxes)
