"""Error rates of recognised speech, through jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec


def error_rates(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Edits from the references to the predictions, over the references' length.

    Returns:
        `word_error_rate` and `character_error_rate`; nothing where jiwer is not installed.
    """
    if find_spec("jiwer") is None:
        return {}
    import jiwer

    return {
        "word_error_rate": jiwer.wer(list(references), list(predictions)),
        "character_error_rate": jiwer.cer(list(references), list(predictions)),
    }
