"""Error rates of recognised speech, through jiwer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamm.core.errors import DataError
from megamm.metrics.libraries import library
from megamm.metrics.pairs import check_pairs


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """What it takes to make each prediction of its reference.

    Attributes:
        edits: Substitutions, deletions and insertions, int64[N].
        lengths: Of the references, int64[N].
    """

    edits: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def rate(self) -> float:
        """All edits over all lengths; above 1 where more was said than there is."""
        return float(self.edits.sum() / self.lengths.sum())


def word_edits(predictions: Sequence[str], references: Sequence[str]) -> Edits:
    """Edits in words, which white space separates; for languages that write it between words.

    Raises:
        DataError: There are none, not one for each reference, or a reference is blank.
        MegaMMError: jiwer is not installed.
    """
    return _edits("process_words", predictions, references)


def character_edits(predictions: Sequence[str], references: Sequence[str]) -> Edits:
    """Edits in characters, inner spaces among them. Composed and decomposed ways to write one character are the same.

    Raises:
        DataError: There are none, not one for each reference, or a reference is blank.
        MegaMMError: jiwer is not installed.
    """
    return _edits("process_characters", predictions, references)


def error_rates(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`word_error_rate` and `character_error_rate` over all samples: edits over the references' length.

    Raises:
        DataError: There are none, not one for each reference, or a reference is blank.
        MegaMMError: jiwer is not installed.
    """
    return {
        "word_error_rate": word_edits(predictions, references).rate,
        "character_error_rate": character_edits(predictions, references).rate,
    }


def _edits(function: str, predictions: Sequence[str], references: Sequence[str]) -> Edits:
    check_pairs(predictions, references)
    align = getattr(library("jiwer"), function)
    for index, reference in enumerate(references):
        if not reference.strip():
            raise DataError(f"reference {index} of {len(references)} is blank, so there is no error rate; leave the sample out")
    results = [align(_composed(reference), _composed(answer)) for answer, reference in zip(predictions, references, strict=True)]
    return Edits(
        np.array([result.substitutions + result.deletions + result.insertions for result in results]),
        np.array([result.hits + result.substitutions + result.deletions for result in results]),
    )


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
