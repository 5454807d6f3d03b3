"""What every metric asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megamm.core.errors import DataError


def check_pairs(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Refuse anything but one prediction for each reference.

    Raises:
        DataError: There are none, or not one for each reference.
    """
    if not len(references) or len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} references; a metric needs one for each, and at least one")
