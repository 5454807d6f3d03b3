"""How often a label is right, over all samples and over each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from megamm.core.errors import DataError


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Share of predictions that equal their reference.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    _check(predictions, references)
    return sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True)) / len(references)


def macro_recall(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Mean over the classes of the references of the share that was found: a rare class counts as much as a common one.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    _check(predictions, references)
    wanted = Counter(references)
    found = Counter(reference for prediction, reference in zip(predictions, references, strict=True) if prediction == reference)
    return sum(found[label] / count for label, count in wanted.items()) / len(wanted)


def majority_share(references: Sequence[Hashable]) -> float:
    """Accuracy of always answering the most frequent reference.

    Raises:
        DataError: There are none.
    """
    _check(references, references)
    return Counter(references).most_common(1)[0][1] / len(references)


def _check(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> None:
    if not references or len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} references; a metric needs one for each, and at least one")
