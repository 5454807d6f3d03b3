"""COCO's average precision, through pycocotools: predictions are matched with references once, then scored over any pictures.

Rules of COCO: in a picture and class, predictions take their best free reference in order of their scores, at IoU thresholds of 0.5,
0.55, …, 0.95; average precision is the mean, over recalls of 0, 0.01, …, 1, of the best precision at that recall or beyond. Regions of
every size count alike. What lies in a crowd is neither right nor wrong.

Source: https://cocodataset.org/#detection-eval and `pycocotools.cocoeval.COCOeval`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamm.core.errors import DataError
from megamm.metrics.libraries import library
from megamm.metrics.pairs import check_pairs


@dataclass(frozen=True, slots=True)
class Region:
    """A box or a mask as pycocotools takes it.

    Attributes:
        label: Its class.
        score: Confidence; 1 for a reference.
        area: In pixels.
        annotation: `bbox` or `segmentation`.
        order: What comes first of regions with equal scores.
    """

    label: str
    score: float
    area: float
    annotation: Mapping[str, Any]
    order: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ClassPrecision:
    """How one class fares.

    Attributes:
        label: The class.
        ap50: Average precision at an IoU of 0.5.
        ap: Average precision, mean over the ten IoU thresholds.
        recall50: Share of the references that were found at an IoU of 0.5.
        recall: The same, mean over the ten IoU thresholds.
        precisions: Best precision at an IoU of 0.5 at each recall of `RECALLS` or beyond: the points of the curve.
        num_references: How many there are, crowds left out.
        num_predictions: How many count: at most the bound a picture.
    """

    label: str
    ap50: float
    ap: float
    recall50: float
    recall: float
    precisions: tuple[float, ...]
    num_references: int
    num_predictions: int


_NUM_REMEMBERED = 256
"""Selections of pictures: more than the resamples of an interval."""
RECALLS = tuple(step / 100 for step in range(101))


@dataclass(frozen=True, slots=True)
class DetectionScores:
    """Average precision over pictures.

    Attributes:
        map50: Mean of `ap50` over the classes; NaN where the pictures hold no reference.
        map: Mean of `ap` over the classes (mAP at 0.5:0.95).
        recall: Mean of `recall` over the classes (AR at as many predictions as count, by default 100 a picture and class).
        classes: Those of the references of these pictures, sorted.
    """

    map50: float
    map: float
    recall: float
    classes: tuple[ClassPrecision, ...]


class Matches:
    """Predictions matched with references.

    Attributes:
        classes: Labels of the references, sorted.
        num_pictures: How many pictures there are.
        num_unknown: Predictions by label that no reference has. COCO's mean has no place for them; a report should say how many there are.
    """

    def __init__(self, evaluator: Any, classes: Sequence[str], num_pictures: int, num_unknown: Mapping[str, int]) -> None:
        self.classes = tuple(classes)
        self.num_pictures = num_pictures
        self.num_unknown = dict(num_unknown)
        self._evaluator = evaluator
        matched = evaluator.evalImgs
        # Several figures are drawn from the same resamples.
        self._scored = functools.lru_cache(_NUM_REMEMBERED)(self._score)
        self._of_class = [matched[start : start + num_pictures] for start in range(0, len(matched), num_pictures)]

    def scores(self, indices: NDArray[np.int64] | Sequence[int] | None = None) -> DetectionScores:
        """Score these pictures, in this order, some maybe several times; all by default.

        Args:
            indices: Numbers of pictures, at most as many as there are. `lambda indices: matches.scores(indices).map50` is a
                statistic for `bootstrap.interval`.

        Raises:
            DataError: There are more of them than pictures.
        """
        chosen = range(self.num_pictures) if indices is None else indices
        if len(chosen) > self.num_pictures:
            raise DataError(f"{len(chosen)} pictures are chosen of {self.num_pictures}; choose at most as many as there are")
        return self._scored(tuple(map(int, chosen)))

    def _score(self, chosen: tuple[int, ...]) -> DetectionScores:
        rows = [[pictures[index] for index in chosen] for pictures in self._of_class]
        evaluator = copy.copy(self._evaluator)
        # Its accumulation counts on a row a picture; those of None say nothing.
        evaluator.evalImgs = [result for row in rows for result in (*row, *[None] * (self.num_pictures - len(row)))]
        _quietly(evaluator.accumulate)
        scored = (_class_precision(evaluator.eval, number, label, rows[number]) for number, label in enumerate(self.classes))
        present = tuple(row for row in scored if row.num_references)
        return DetectionScores(
            *(_mean([getattr(row, name) for row in present]) for name in ("ap50", "ap", "recall")),
            classes=present,
        )


def match(
    predictions: Sequence[Sequence[Region]],
    references: Sequence[Sequence[Region]],
    crowds: Sequence[Sequence[Region]] | None,
    *,
    iou_type: str,
    max_predictions: int,
) -> Matches:
    """Match regions picture by picture.

    Args:
        predictions: Of each picture, in any order; those with equal scores take theirs by picture, then by `order`.
        references: Of each picture.
        crowds: Of each picture, regions of many objects of a class; None for none.
        iou_type: `bbox` or `segm`.
        max_predictions: How many count in a picture and class, those with the highest scores.

    Raises:
        DataError: There are no pictures, not one prediction list for each, no reference at all, or a score is no number.
        MegaMMError: pycocotools is not installed.
    """
    check_pairs(predictions, references)
    crowds = [[] for _ in references] if crowds is None else crowds
    check_pairs(crowds, references)
    classes = sorted({region.label for regions in references for region in regions})
    if not classes:
        raise DataError(f"none of {len(references)} pictures has a reference, so precision is undefined; check the references")
    evaluator = library("pycocotools.cocoeval").COCOeval(iouType=iou_type)
    evaluator.params.imgIds = list(range(1, len(references) + 1))
    evaluator.params.catIds = list(range(1, len(classes) + 1))
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, math.inf]], ["all"]
    evaluator.params.maxDets = [max_predictions]
    evaluator.params.recThrs = np.array(RECALLS)
    evaluator.cocoGt = _dataset([(references, 0), (crowds, 1)], classes)
    evaluator.cocoDt = _dataset([([_in_order(index, regions) for index, regions in enumerate(predictions)], 0)], classes)
    _quietly(evaluator.evaluate)
    unknown = Counter(region.label for regions in predictions for region in regions if region.label not in set(classes))
    return Matches(evaluator, classes, len(references), unknown)


def _in_order(index: int, regions: Sequence[Region]) -> list[Region]:
    for region in regions:
        if not math.isfinite(region.score):
            raise DataError(f"a prediction {region.label!r} of picture {index} has score={region.score}; give a number")
    return sorted(regions, key=lambda region: (-region.score, region.order))


def _dataset(groups: Sequence[tuple[Sequence[Sequence[Region]], int]], classes: Sequence[str]) -> Any:
    """A `pycocotools.coco.COCO` of groups of regions, each with its `iscrowd`."""
    category = {label: number for number, label in enumerate(classes, 1)}
    annotations = [
        {
            **region.annotation,
            "image_id": picture,
            "category_id": category[region.label],
            "area": region.area,
            "score": region.score,
            "iscrowd": iscrowd,
        }
        for pictures, iscrowd in groups
        for picture, regions in enumerate(pictures, 1)
        for region in regions
        if region.label in category
    ]
    num_pictures = len(groups[0][0])
    dataset = library("pycocotools.coco").COCO()
    dataset.dataset = {
        # pycocotools looks sizes up and, because masks come as run lengths that know theirs, does not use them.
        "images": [{"id": picture, "height": 0, "width": 0} for picture in range(1, num_pictures + 1)],
        "categories": [{"id": number, "name": label} for label, number in category.items()],
        # From 1: to pycocotools a match with id 0 is none.
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
    }
    _quietly(dataset.createIndex)
    return dataset


def _class_precision(result: Mapping[str, Any], number: int, label: str, matched: Sequence[Mapping[str, Any] | None]) -> ClassPrecision:
    precision, recall = result["precision"][:, :, number, 0, 0], result["recall"][:, number, 0, 0]
    return ClassPrecision(
        label,
        ap50=float(precision[0].mean()),
        ap=float(precision.mean()),
        recall50=float(recall[0]),
        recall=float(recall.mean()),
        precisions=tuple(map(float, precision[0])),
        num_references=sum(int(np.count_nonzero(row["gtIgnore"] == 0)) for row in matched if row),
        num_predictions=sum(len(row["dtScores"]) for row in matched if row),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _quietly(function: Any) -> None:
    """Call without the lines that pycocotools prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        function()
