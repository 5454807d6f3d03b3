"""Segmentation: the answer is the instances of a picture, each as the outline of its pixels."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.core.predictions import Instance
from megamm.metrics.bootstrap import mean_of, ratio_of
from megamm.metrics.masks import foreground, match_instances
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task

_NUM_RESAMPLES = 200


def _parse(reply: Reply) -> tuple[Instance, ...]:
    return reply.instances


def _figures(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> list[Figure]:
    overlap, matches = foreground(predictions, references), match_instances(predictions, references)
    return [
        Figure("foreground_iou", mean_of(overlap.ious)),
        Figure("pooled_foreground_iou", ratio_of(overlap.intersections, overlap.unions)),
        Figure("ap50", lambda indices: matches.scores(indices).map50, num_resamples=_NUM_RESAMPLES),
        Figure("ap", lambda indices: matches.scores(indices).map, num_resamples=_NUM_RESAMPLES),
    ]


TASK = Task("segmentation", "Outline every object.", _parse, _figures)
