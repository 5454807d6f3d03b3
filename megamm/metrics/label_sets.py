"""Several labels a sample: F1 of sets. Whether a whole set is right is `classes.accuracy` of frozensets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamm.core.errors import DataError
from megamm.metrics.bootstrap import Statistic
from megamm.metrics.classes import ClassScore
from megamm.metrics.libraries import library
from megamm.metrics.pairs import check_pairs

Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LabelSetScores:
    """How answered label sets compare with the references.

    Attributes:
        macro_f1: Mean of F1 over the labels of the references.
        micro_f1: F1 of all labels of all samples as one pool; a label that no reference has is a false one.
        classes: Each label of the references, sorted.
    """

    macro_f1: float
    micro_f1: float
    classes: tuple[ClassScore, ...]


def label_set_scores(predictions: Sequence[AbstractSet[str]], references: Sequence[AbstractSet[str]]) -> LabelSetScores:
    """Macro and micro F1 of label sets, either of which may be empty for a sample.

    Raises:
        DataError: There are none, not one for each reference, or no reference holds a label.
        MegaMMError: scikit-learn is not installed.

    Source: `sklearn.metrics.precision_recall_fscore_support` on indicator matrices.
    """
    check_pairs(predictions, references)
    classes = sorted(_frequencies(references))
    answers = classes + sorted(set().union(*predictions) - set(classes))
    wanted, given = _indicators(references, answers), _indicators(predictions, answers)
    scores = library("sklearn.metrics").precision_recall_fscore_support
    precision, recall, f1, support = scores(wanted, given, labels=range(len(classes)), zero_division=np.nan)
    _, _, micro_f1, _ = scores(wanted, given, labels=range(len(answers)), average="micro", zero_division=0)
    num_answers = given.sum(axis=0)
    rows = tuple(
        ClassScore(
            label,
            precision=float(precision[index]) if num_answers[index] else None,
            recall=float(recall[index]),
            f1=float(f1[index]),
            num_references=int(support[index]),
            num_answers=int(num_answers[index]),
        )
        for index, label in enumerate(classes)
    )
    return LabelSetScores(sum(row.f1 for row in rows) / len(rows), float(micro_f1), rows)


def macro_f1_statistic(predictions: Sequence[AbstractSet[str]], references: Sequence[AbstractSet[str]]) -> Statistic:
    """`macro_f1` over selected samples, from counts alone; for single labels, of sets of one. NaN where no selected reference has a label.

    Raises:
        DataError: As `label_set_scores`.
    """
    classes = sorted(_frequencies(references))
    return _f1_statistic(predictions, references, classes, lambda found, given, wanted: (2 * found / (given + wanted))[wanted > 0])


def micro_f1_statistic(predictions: Sequence[AbstractSet[str]], references: Sequence[AbstractSet[str]]) -> Statistic:
    """`micro_f1` over selected samples, from counts alone; NaN where no selected reference has a label.

    Raises:
        DataError: As `label_set_scores`.
    """
    answers = sorted(set(_frequencies(references)).union(*predictions))

    def pooled(found: Sums, given: Sums, wanted: Sums) -> Sums:
        return 2 * found.sum(keepdims=True) / (given + wanted).sum() if wanted.any() else found[:0]

    return _f1_statistic(predictions, references, answers, pooled)


def constant_macro_f1(references: Sequence[AbstractSet[str]]) -> float:
    """Macro F1 of always answering every label, the best set to answer without looking: F1 is `2 p / (1 + p)` at a share of p.

    Raises:
        DataError: There are none, or none holds a label.
    """
    shares = [count / len(references) for count in _frequencies(references).values()]
    return sum(2 * share / (1 + share) for share in shares) / len(shares)


def constant_micro_f1(references: Sequence[AbstractSet[str]]) -> float:
    """Micro F1 of always answering the best set: the k most frequent labels, for the best k.

    Raises:
        DataError: There are none, or none holds a label.
    """
    counts = sorted(_frequencies(references).values(), reverse=True)
    found = np.cumsum(counts)
    answered = len(references) * np.arange(1, len(counts) + 1)
    return float((2 * found / (answered + sum(counts))).max())


def _frequencies(references: Sequence[AbstractSet[str]]) -> Counter[str]:
    check_pairs(references, references)
    counts = Counter(label for labels in references for label in labels)
    if not counts:
        raise DataError(f"none of {len(references)} reference label sets holds a label, so F1 is undefined; check the labels' field")
    return counts


def _f1_statistic(
    predictions: Sequence[AbstractSet[str]],
    references: Sequence[AbstractSet[str]],
    labels: Sequence[str],
    scores: Callable[[Sums, Sums, Sums], Sums],
) -> Statistic:
    """The mean of `scores` of how often each label is rightly given, given and wanted."""
    check_pairs(predictions, references)
    known = set(labels)
    given = _indicators([answered & known for answered in predictions], labels).astype(np.float64)
    wanted = _indicators(references, labels).astype(np.float64)
    columns = np.concatenate([given * wanted, given, wanted], axis=1)

    def statistic(indices: NDArray[np.int64]) -> float:
        times = np.bincount(indices, minlength=len(columns)).astype(np.float64)
        found, answered, asked = (part[:-1] for part in np.split(times @ columns, 3))
        with np.errstate(invalid="ignore"):
            values = scores(found, answered, asked)
        return float(values.mean()) if values.size else float("nan")

    return statistic


def _indicators(label_sets: Sequence[AbstractSet[str]], labels: Sequence[str]) -> NDArray[np.int8]:
    """int8[N, L + 1]: a last column of zeros, because scikit-learn takes a single column for classes 0 and 1."""
    number = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(label_sets), len(labels) + 1), dtype=np.int8)
    for row, members in zip(matrix, label_sets, strict=True):
        row[[number[label] for label in members]] = 1
    return matrix
