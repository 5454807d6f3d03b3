"""Segmentation: the answer is the instances of a picture, each as the outline of its pixels."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.core.predictions import Instance
from megamm.metrics.bootstrap import mean_of, ratio_of
from megamm.metrics.coco import Matches
from megamm.metrics.masks import class_overlaps, foreground, match_instances, mean_class_iou
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task

_NUM_RESAMPLES = 200
_MAX_PREDICTIONS = 1000
"""Of a picture and class: pictures of cells hold hundreds, where COCO's own bound is 100."""


def _parse(reply: Reply) -> tuple[Instance, ...]:
    return reply.instances


def _match(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> Matches:
    return match_instances(predictions, references, max_predictions=_MAX_PREDICTIONS)


def _figures(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> list[Figure]:
    overlap, matches = foreground(predictions, references), _match(predictions, references)
    return [
        Figure("foreground_iou", mean_of(overlap.ious)),
        Figure("pooled_foreground_iou", ratio_of(overlap.intersections, overlap.unions)),
        Figure("mean_iou", mean_class_iou(class_overlaps(predictions, references))),
        Figure("ap50", lambda indices: matches.scores(indices).map50, num_resamples=_NUM_RESAMPLES),
        Figure("ap", lambda indices: matches.scores(indices).map, num_resamples=_NUM_RESAMPLES),
    ]


TASK = Task("segmentation", "Outline every object.", _parse, _figures, media=("image",), kinds=("mask",), match=_match)
