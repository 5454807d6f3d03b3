"""Detection: average precision of labelled boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megamm.core.errors import DataError
from megamm.core.predictions import Box
from megamm.metrics.coco import DetectionScores, Matches, Region, match


def match_boxes(
    predictions: Sequence[Sequence[Box]],
    references: Sequence[Sequence[Box]],
    *,
    max_predictions: int = 100,
) -> Matches:
    """Match the boxes of each picture; pictures may have no box and no prediction.

    Args:
        predictions: Of each picture; at the edge of what a model says a box may have no area, and finds nothing then.
        references: Of each picture, crowds among them.
        max_predictions: How many count in a picture and class, those with the highest scores.

    Raises:
        DataError: No pictures, not one list for each, no reference at all, a reference without area, or a box whose corners are no
            numbers or change places.
        MegaMMError: pycocotools is not installed.
    """
    objects, crowds = ([[box for box in boxes if box.is_crowd == is_crowd] for boxes in references] for is_crowd in (False, True))
    return match(
        _regions(predictions, "prediction", least=0.0),
        _regions(objects, "reference"),
        _regions(crowds, "crowd"),
        iou_type="bbox",
        max_predictions=max_predictions,
    )


def box_scores(predictions: Sequence[Sequence[Box]], references: Sequence[Sequence[Box]]) -> DetectionScores:
    """mAP50, mAP50:95, recall at 100 predictions, and a row a class with its precision-recall curve.

    Raises:
        DataError: As `match_boxes`.
        MegaMMError: pycocotools is not installed.
    """
    return match_boxes(predictions, references).scores()


def _regions(pictures: Sequence[Sequence[Box]], what: str, *, least: float | None = None) -> list[list[Region]]:
    return [[_region(box, f"{what} {box.label!r} of picture {index}", least) for box in boxes] for index, boxes in enumerate(pictures)]


def _region(box: Box, what: str, least: float | None) -> Region:
    x1, y1, x2, y2 = box.xyxy
    width, height = x2 - x1, y2 - y1
    # NaN compares as false, so it is refused with the rest.
    fits = (width > 0 and height > 0) if least is None else (width >= least and height >= least)
    if not fits or not all(map(math.isfinite, box.xyxy)):
        raise DataError(f"{what} has xyxy={list(box.xyxy)}; give finite corners with x1 < x2 and y1 < y2")
    return Region(box.label, box.score, width * height, {"bbox": [x1, y1, width, height]}, box.xyxy)
