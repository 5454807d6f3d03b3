"""What a run may skip: a share of its samples, and so many one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.core.logging import get_logger
from megamm.data.ledger import EXCLUDED, BudgetSpent, Skipped, check_budget

_log = get_logger("data")
_MAX_WARNINGS_A_STEP = 3


class Budget:
    """Holds the samples of a rank that could not be used against those that it planned. Excluded samples count as delivered.

    State: the counts, from the beginning of the run where they are handed in; how many were skipped in a row, since this loader started.
    """

    def __init__(self, max_share: float, max_in_a_row: int, *, num_planned: float = 0.0, num_skipped: float = 0.0) -> None:
        """Begin.

        Args:
            max_share: Share of skipped samples that is borne.
            max_in_a_row: Skipped samples without a delivered one between them that are borne.
            num_planned: This rank's share of the samples that the run has planned already.
            num_skipped: Its share of those that were skipped.
        """
        self._max_share, self._max_in_a_row = max_share, max_in_a_row
        self._num_planned, self._num_skipped = num_planned, num_skipped
        self._num_in_a_row = 0
        self._last: Skipped | None = None
        self._named: set[tuple[str, str]] = set()

    def charge(self, results: Sequence[Skipped | None], *, unfit: Sequence[Skipped] = (), num_unfit: float = 0.0) -> None:
        """Count a step.

        Args:
            results: For each sample of this rank's rows, in order, its entry in the ledger or None where it was delivered.
            unfit: Samples that no row holds and that this rank answers for.
            num_unfit: This rank's share of all that no row holds, however many of them it answers for.

        Raises:
            BudgetSpent: More was skipped than is borne; holds what the whole step skipped.
        """
        try:
            self._charge(results, unfit, num_unfit)
        except BudgetSpent as error:
            error.skipped = [*unfit, *(entry for entry in results if entry is not None)]
            raise

    def _charge(self, results: Sequence[Skipped | None], unfit: Sequence[Skipped], num_unfit: float) -> None:
        self._num_planned += len(results) + num_unfit
        self._num_skipped += num_unfit
        self._warn([*unfit, *(entry for entry in results if entry is not None and entry.reason != EXCLUDED)])
        for entry in results:
            if entry is None:
                self._num_in_a_row = 0
            elif entry.reason != EXCLUDED:
                self._num_skipped += 1
                self._num_in_a_row += 1
                self._check_row(entry)
        check_budget(self._num_skipped, self._num_planned, self._max_share, last=self._last)

    def _check_row(self, entry: Skipped) -> None:
        if self._num_in_a_row > self._max_in_a_row:
            raise BudgetSpent(
                f"{self._num_in_a_row} samples in a row were skipped, data.max_skipped_in_a_row is {self._max_in_a_row}; "
                f"the last is {entry.dataset}/{entry.key} in {entry.shard}: {entry.reason}"
            )

    def _warn(self, entries: Sequence[Skipped]) -> None:
        """Name samples, each once however many epochs there are; the ledger has them all."""
        new = {(entry.dataset, entry.key): entry for entry in entries if (entry.dataset, entry.key) not in self._named}
        self._named.update(new)
        self._last = entries[-1] if entries else self._last
        for entry in list(new.values())[:_MAX_WARNINGS_A_STEP]:
            _log.warning("skipped %s/%s in %s: %s", entry.dataset, entry.key, entry.shard, entry.reason)
        if len(new) > _MAX_WARNINGS_A_STEP:
            _log.warning("and %d more samples of this step; `megamm data report` lists them", len(new) - _MAX_WARNINGS_A_STEP)
