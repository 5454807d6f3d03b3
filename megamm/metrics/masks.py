"""Segmentation: how far predicted pixels cover the right ones, as foreground, by class and by instance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamm.core.errors import DataError
from megamm.core.predictions import Instance
from megamm.metrics.bootstrap import Statistic, ratio_of
from megamm.metrics.coco import DetectionScores, Matches, Region, match
from megamm.metrics.libraries import library
from megamm.metrics.pairs import check_pairs


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """How two sets of pixels lie in each picture.

    Attributes:
        intersections: Pixels in both, int64[N].
        unions: Pixels in either, int64[N].
    """

    intersections: NDArray[np.int64]
    unions: NDArray[np.int64]

    @property
    def ious(self) -> NDArray[np.float64]:
        """IoU of each picture, float64[N]; 1 where both sets are empty, because that is right."""
        return np.where(self.unions == 0, 1.0, self.intersections / np.maximum(self.unions, 1))

    @property
    def mean_iou(self) -> float:
        """Mean of the pictures' IoU: a small object counts as much as a large one."""
        return float(self.ious.mean())

    @property
    def pooled_iou(self) -> float:
        """IoU of all pixels of all pictures as one; NaN where there are none."""
        total = self.unions.sum()
        return float(self.intersections.sum() / total) if total else math.nan


def foreground(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> Overlap:
    """Overlap of all predicted pixels with all reference pixels of each picture, whatever their labels.

    Raises:
        DataError: No pictures, not one list for each, or masks of one picture that are not of one size.
        MegaMMError: pycocotools is not installed.
    """
    _check(predictions, references)
    return _overlap(predictions, references)


def class_overlaps(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> dict[str, Overlap]:
    """Label of the references -> overlap of its pixels in each picture; pixels of no instance belong to no class.

    Raises:
        DataError: As `foreground`.
        MegaMMError: pycocotools is not installed.
    """
    _check(predictions, references)
    labels = sorted({instance.label for instances in references for instance in instances})
    return {label: _overlap(_labelled(predictions, label), _labelled(references, label)) for label in labels}


def mean_class_iou(overlaps: Mapping[str, Overlap]) -> Statistic:
    """Mean over classes of their pooled IoU; NaN over pictures that have pixels of no class.

    Source: Everingham et al., The PASCAL VOC challenge: a retrospective (2015), section 2.2, segmentation accuracy.
    """
    of_classes = [ratio_of(one.intersections, one.unions) for one in overlaps.values()]

    def statistic(indices: NDArray[np.int64]) -> float:
        found = [iou for ratio in of_classes if not math.isnan(iou := ratio(indices))]
        return sum(found) / len(found) if found else math.nan

    return statistic


def match_instances(
    predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]], *, max_predictions: int = 100
) -> Matches:
    """Match the instances of each picture for average precision.

    Args:
        predictions: Of each picture, maybe none.
        references: Of each picture, maybe none.
        max_predictions: How many count in a picture and class; raise it where pictures hold more (COCO's own figure is 100).

    Raises:
        DataError: As `foreground`, no reference at all, or a reference without pixels.
        MegaMMError: pycocotools is not installed.
    """
    _check(predictions, references)
    for index, instances in enumerate(references):
        if empty := [instance.label for instance in instances if not sum(instance.counts[1::2])]:
            raise DataError(f"reference {empty[0]!r} of picture {index} has no pixels; leave it out")
    return match(_regions(predictions), _regions(references), None, iou_type="segm", max_predictions=max_predictions)


def instance_scores(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> DetectionScores:
    """Average precision of instances at an IoU of 0.5 and 0.5:0.95, over all classes and by class.

    Raises:
        DataError: As `match_instances`.
        MegaMMError: pycocotools is not installed.
    """
    return match_instances(predictions, references).scores()


def constant_foreground(references: Sequence[Sequence[Instance]], sizes: Sequence[tuple[int, int]]) -> Overlap:
    """Overlap when every pixel of every picture is called foreground, the best answer without looking.

    Args:
        references: Of each picture.
        sizes: Height and width of each picture in pixels, because one without references does not say.

    Raises:
        DataError: No pictures, not one size for each, or masks of another size.
        MegaMMError: pycocotools is not installed.
    """
    check_pairs(sizes, references)
    return foreground([[Instance("", size, (0, size[0] * size[1]))] for size in sizes], references)


def _check(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> None:
    """Refuse what pycocotools would read past its end, or take for no overlap."""
    check_pairs(predictions, references)
    for index, (given, wanted) in enumerate(zip(predictions, references, strict=True)):
        if len(sizes := {instance.size for instance in (*given, *wanted)}) > 1:
            raise DataError(f"masks of picture {index} have sizes {sorted(sizes)}; give all in the picture's own height and width")
        for instance in (*given, *wanted):
            height, width = instance.size
            if sum(instance.counts) != height * width or min(instance.counts, default=0) < 0:
                raise DataError(
                    f"the run lengths of mask {instance.label!r} of picture {index} sum to {sum(instance.counts)}, "
                    f"not to {height} × {width} pixels, or are negative; encode it again"
                )


def _rle(instance: Instance) -> dict[str, Any]:
    return library("pycocotools.mask").frPyObjects({"size": list(instance.size), "counts": list(instance.counts)}, *instance.size)


def _regions(pictures: Sequence[Sequence[Instance]]) -> list[list[Region]]:
    return [[_region(instance) for instance in instances] for instances in pictures]


def _region(instance: Instance) -> Region:
    return Region(instance.label, instance.score, float(sum(instance.counts[1::2])), {"segmentation": _rle(instance)}, instance.counts)


def _labelled(pictures: Sequence[Sequence[Instance]], label: str) -> list[list[Instance]]:
    return [[instance for instance in instances if instance.label == label] for instances in pictures]


def _overlap(predictions: Sequence[Sequence[Instance]], references: Sequence[Sequence[Instance]]) -> Overlap:
    counted = [_counted(given, wanted) for given, wanted in zip(predictions, references, strict=True)]
    return Overlap(*np.array(counted, dtype=np.int64).T)


def _counted(given: Sequence[Instance], wanted: Sequence[Instance]) -> tuple[int, int]:
    """Pixels of one picture in both and in either."""
    mask = library("pycocotools.mask")
    sides: list[Mapping[str, Any]] = [mask.merge([_rle(instance) for instance in side]) for side in (given, wanted) if side]
    either = int(mask.area(mask.merge(sides))) if sides else 0
    both = int(mask.area(mask.merge(sides, intersect=True))) if len(sides) == 2 else 0
    return both, either
