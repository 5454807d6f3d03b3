"""The ledger: every sample that was planned and not delivered, with the reason, and the budget that such samples have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megamm.core.errors import DataError

MIN_BUDGET_SAMPLES = 1000
"""The budget is a share of at least this many samples, so that one bad sample of the first ten does not end a run."""


EXCLUDED = "excluded"
"""The reason of samples that somebody keeps out; they are not held against the budget."""


class BadSample(DataError):
    """One sample that cannot be used; it is skipped, keeps its position and enters the ledger. Every other error ends the run."""


class BudgetSpent(DataError):
    """More was skipped than a run bears.

    Attributes:
        skipped: What the step that spent it skipped: no batch will ever hold these entries.
    """

    def __init__(self, message: str, skipped: Sequence[Skipped] = ()) -> None:
        super().__init__(message)
        self.skipped = list(skipped)


@dataclass(frozen=True, slots=True)
class Skipped:
    """One entry of the ledger.

    Attributes:
        position: Position in the plan's stream of samples.
        dataset: Name of the dataset.
        shard: File name of its shard.
        key: Sample key.
        reason: Why, in one line.
    """

    position: int
    dataset: str
    shard: str
    key: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Skipped:
        """Read what `to_json` gave."""
        return cls(**value)


def merge(entries: Iterable[Skipped]) -> list[Skipped]:
    """The entries of all ranks and steps in the order of their positions, each position once."""
    return [entry for _, entry in sorted({entry.position: entry for entry in entries}.items())]


def check_budget(num_skipped: float, num_samples: float, max_share: float, *, last: Skipped | None = None) -> None:
    """End a run whose data are rotten.

    Args:
        num_skipped: Samples that were skipped among `num_samples`; a rank's share of what all ranks skip may be a fraction.
        num_samples: Samples that were planned so far.
        max_share: Share of skipped samples that is still borne.
        last: The one to name.

    Raises:
        BudgetSpent: More were skipped.
    """
    if num_skipped > max_share * max(num_samples, MIN_BUDGET_SAMPLES):
        example = "" if last is None else f"; the last is {last.dataset}/{last.key} in {last.shard}: {last.reason}"
        raise BudgetSpent(
            f"{math.ceil(num_skipped)} of {math.ceil(num_samples)} samples were skipped, data.max_skipped_share is {max_share}{example}"
        )
