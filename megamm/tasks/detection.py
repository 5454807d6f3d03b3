"""Detection: the answer is a list of labelled boxes in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamm.core.errors import DataError
from megamm.core.predictions import Box
from megamm.metrics.boxes import match_boxes
from megamm.tasks.parts import parse_part
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task

_NUM_RESAMPLES = 200


def _parse(reply: Reply) -> tuple[Box, ...]:
    return reply.boxes


def crowds_of(metadata: Mapping[str, Any]) -> tuple[Box, ...]:
    """Boxes around many objects that `megamm prepare coco` keeps beside a sample as `crowd`; what else stands there is no crowd."""
    found = metadata.get("crowd")
    try:
        boxes = parse_part({"type": "boxes", "image": 0, "boxes": found}, "crowd", "metadata").data["boxes"]
    except DataError:
        return ()
    return tuple(Box(box["label"].strip(), tuple(box["xyxy"]), is_crowd=True) for box in boxes)


def _figures(predictions: Sequence[Sequence[Box]], references: Sequence[Sequence[Box]]) -> list[Figure]:
    matches = match_boxes(predictions, references)
    return [
        Figure("map50", lambda indices: matches.scores(indices).map50, num_resamples=_NUM_RESAMPLES),
        Figure("map", lambda indices: matches.scores(indices).map, num_resamples=_NUM_RESAMPLES),
        Figure("recall", lambda indices: matches.scores(indices).recall, num_resamples=_NUM_RESAMPLES),
    ]


TASK = Task("detection", "Find every object.", _parse, _figures, media=("image",), kinds=("boxes",), match=match_boxes)
