"""How often a label is right, over all samples and over each class.

The classes are the labels of the references. An answer that is none of them is wrong, and shows in the confusion counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamm.metrics.libraries import library
from megamm.metrics.pairs import check_pairs


@dataclass(frozen=True, slots=True)
class Confusion:
    """What was answered where.

    Attributes:
        classes: Labels of the references, sorted: the rows.
        answers: The classes, then what was answered besides them, sorted: the columns.
        counts: Samples of each class with each answer, `counts[class][answer]`.
    """

    classes: tuple[str, ...]
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How one class fares.

    Attributes:
        label: The class.
        precision: Share of the answers with this label that are right; None where nothing was answered so.
        recall: Share of the references with this label that were found.
        f1: Harmonic mean of the two, `2 TP / (2 TP + FP + FN)`; 0 for a class that was never answered.
        num_references: How many references have it.
        num_answers: How many answers have it.
    """

    label: str
    precision: float | None
    recall: float
    f1: float
    num_references: int
    num_answers: int


def correct(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> NDArray[np.bool_]:
    """Whether each prediction equals its reference, bool[N]: accuracy is its mean.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    check_pairs(predictions, references)
    return np.array([prediction == reference for prediction, reference in zip(predictions, references, strict=True)])


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Share of predictions that equal their reference.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    return float(correct(predictions, references).mean())


def macro_recall(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Mean over the classes of the references of the share that was found: a rare class counts as much as a common one.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    check_pairs(predictions, references)
    wanted = Counter(references)
    found = Counter(reference for prediction, reference in zip(predictions, references, strict=True) if prediction == reference)
    return sum(found[label] / count for label, count in wanted.items()) / len(wanted)


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of F1 over the classes of the references; `label_sets.macro_f1_statistic` is the fast way to an interval.

    Raises:
        DataError: There are none, or not one for each reference.
        MegaMMError: scikit-learn is not installed.
    """
    return sum(score.f1 for score in class_scores(predictions, references)) / len(set(references))


def class_scores(predictions: Sequence[str], references: Sequence[str]) -> tuple[ClassScore, ...]:
    """Precision, recall and F1 of each class of the references, sorted by label.

    Raises:
        DataError: There are none, or not one for each reference.
        MegaMMError: scikit-learn is not installed.

    Source: `sklearn.metrics.precision_recall_fscore_support`.
    """
    check_pairs(predictions, references)
    classes, answers = _rows_and_columns(predictions, references)
    number = {label: index for index, label in enumerate(answers)}
    precision, recall, f1, support = library("sklearn.metrics").precision_recall_fscore_support(
        [number[label] for label in references],
        [number[label] for label in predictions],
        labels=range(len(classes)),
        zero_division=np.nan,
    )
    num_answers = Counter(predictions)
    return tuple(
        ClassScore(
            label,
            precision=float(precision[index]) if num_answers[label] else None,
            recall=float(recall[index]),
            f1=float(f1[index]),
            num_references=int(support[index]),
            num_answers=num_answers[label],
        )
        for index, label in enumerate(classes)
    )


def confusion(predictions: Sequence[str], references: Sequence[str]) -> Confusion:
    """Count which answers each class got.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    check_pairs(predictions, references)
    classes, answers = _rows_and_columns(predictions, references)
    pairs = Counter(zip(references, predictions, strict=True))
    return Confusion(classes, answers, tuple(tuple(pairs[label, answer] for answer in answers) for label in classes))


def majority_share(references: Sequence[Hashable]) -> float:
    """Accuracy of always answering the most frequent reference.

    Raises:
        DataError: There are none.
    """
    check_pairs(references, references)
    return Counter(references).most_common(1)[0][1] / len(references)


def constant_macro_recall(references: Sequence[Hashable]) -> float:
    """Macro recall of always answering one class, whichever: one over the number of classes.

    Raises:
        DataError: There are none.
    """
    check_pairs(references, references)
    return 1 / len(set(references))


def constant_macro_f1(references: Sequence[Hashable]) -> float:
    """Macro F1 of always answering the most frequent of C classes: its F1 is `2 p / (1 + p)` at a share of p, and 0 that of the others.

    Raises:
        DataError: There are none.
    """
    share = majority_share(references)
    return 2 * share / (1 + share) / len(set(references))


def _rows_and_columns(predictions: Sequence[str], references: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    classes = sorted(set(references))
    return tuple(classes), (*classes, *sorted(set(predictions) - set(classes)))
