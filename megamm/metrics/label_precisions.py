"""How precise each label is at each recall, where every label of a sample has a score.

A label is one question of its own: over all samples, those that have it against those that have not, in the order of its score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from megamm.metrics.libraries import library
from megamm.metrics.pairs import check_pairs


@dataclass(frozen=True, slots=True)
class LabelPrecision:
    """The precision-recall curve of one label.

    Attributes:
        label: The label.
        recalls: From 1 down to 0.
        precisions: At each of them.
        average_precision: The area below, by steps.
        num_references: Samples that have the label.
    """

    label: str
    recalls: tuple[float, ...]
    precisions: tuple[float, ...]
    average_precision: float
    num_references: int


def label_precisions(scores: Sequence[Mapping[str, float]], references: Sequence[AbstractSet[str]]) -> tuple[LabelPrecision, ...]:
    """The curve of each label of the references, sorted by label.

    Args:
        scores: Of each sample, label -> score; a label without one counts as surely not there.
        references: Labels of each sample.

    Raises:
        DataError: There are none, or not one for each reference.
        MegaMMError: scikit-learn is not installed.

    Source: `sklearn.metrics.precision_recall_curve` and `average_precision_score`.
    """
    check_pairs(scores, references)
    metrics = library("sklearn.metrics")
    found = []
    for label in sorted(frozenset().union(*references)):
        wanted = np.array([label in one for one in references])
        given = np.array([one.get(label, 0.0) for one in scores])
        precisions, recalls, _ = metrics.precision_recall_curve(wanted, given)
        area = float(metrics.average_precision_score(wanted, given))
        found.append(LabelPrecision(label, tuple(recalls.tolist()), tuple(precisions.tolist()), area, int(wanted.sum())))
    return tuple(found)
