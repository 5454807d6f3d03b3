"""Rows of a window: what is in them, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamm.data.keyed import derive_key
from megamm.data.planning.packing import UNFIT, pack

_GOLDEN_RATIO = 0x9E3779B97F4A7C15
"""Its fractional part in units of 2**-64."""


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What a row costs, in units of what a token costs the decoder outside attention.

    Every row runs as many tokens as it could hold, padding included; what it holds makes it costlier than that.

    Attributes:
        token_pair: A pair of tokens of one document in attention.
        patch: A patch through the vision tower.
        frame: A mel frame through the audio tower.
    """

    token_pair: float = 1 / 8192
    patch: float = 0.25
    frame: float = 0.05


DEFAULT_COSTS = RowCosts()


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample at its position.

    Attributes:
        position: In the stream of the run.
        dataset: Name of its dataset.
        index: Number inside the dataset.
        epoch: Pass over the dataset.
        tokens: Planned tokens.
        patches: Planned patches.
        frames: Planned mel frames.
        variant: Which of the lengths that its dataset was planned with; above 0 only where augmentation changes lengths.
    """

    position: int
    dataset: str
    index: int
    epoch: int
    tokens: int
    patches: int
    frames: int
    variant: int = 0


@dataclass(frozen=True)
class Window:
    """The rows of one window of positions. Legend: n positions, R rows.

    Attributes:
        positions: int64[n], first position of the window and those that follow.
        dataset_names: Names that `datasets` indexes.
        datasets: int64[n].
        indices: int64[n], sample inside its dataset.
        epochs: int64[n].
        lengths: int32[n, 3], tokens, patches and frames.
        variants: int64[n], which of the lengths of its dataset each sample has.
        members: int64, places (0 to n - 1) of the samples of row 0, then of row 1, ...; by position within a row.
        starts: int64[R + 1], where each row starts in `members`.
        unfit: int64, places of the samples that no row holds.
        costs: float64[R].
    """

    positions: np.ndarray
    dataset_names: tuple[str, ...]
    datasets: np.ndarray
    indices: np.ndarray
    epochs: np.ndarray
    lengths: np.ndarray
    variants: np.ndarray
    members: np.ndarray
    starts: np.ndarray
    unfit: np.ndarray
    costs: np.ndarray

    @classmethod
    def pack(
        cls,
        dataset_names: tuple[str, ...],
        positions: np.ndarray,
        *,
        datasets: np.ndarray,
        indices: np.ndarray,
        epochs: np.ndarray,
        lengths: np.ndarray,
        capacity: tuple[int, int, int],
        costs: RowCosts,
        row_key: int | None,
        variants: np.ndarray | None = None,
    ) -> Window:
        """Pack samples into rows.

        Args:
            dataset_names: Names that `datasets` indexes.
            positions: int64[n].
            datasets: int64[n].
            indices: int64[n].
            epochs: int64[n].
            lengths: int32[n, 3].
            capacity: Tokens, patches and frames of a row.
            costs: What makes a row costly.
            row_key: Spreads the rows over the window by cost; None keeps them in the order of packing.
            variants: int64[n]; zeros by default.
        """
        packed = pack(lengths, capacity)
        num_rows = int(packed.max(initial=UNFIT)) + 1
        fit = np.flatnonzero(packed != UNFIT)
        used = lengths[fit].astype(np.float64)
        cost = costs.token_pair * used[:, 0] ** 2 + costs.patch * used[:, 1] + costs.frame * used[:, 2]
        rows = packed[fit]
        row_costs = capacity[0] + np.bincount(rows, weights=cost, minlength=num_rows)
        if row_key is not None:
            places = _spread(row_costs, row_key)
            rows, row_costs[places] = places[rows], row_costs.copy()
        return cls(
            positions=positions,
            dataset_names=dataset_names,
            datasets=datasets,
            indices=indices,
            epochs=epochs,
            lengths=lengths,
            variants=np.zeros_like(indices) if variants is None else variants,
            members=fit[np.argsort(rows, kind="stable")],
            starts=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]),
            unfit=np.flatnonzero(packed == UNFIT),
            costs=row_costs,
        )

    @property
    def num_rows(self) -> int:
        """Rows of the window."""
        return len(self.costs)

    def samples(self, places: np.ndarray) -> tuple[PlannedSample, ...]:
        """The samples at some places."""
        columns = (self.positions, self.datasets, self.indices, self.epochs, self.variants)
        rows = zip(*(column[places].tolist() for column in columns), self.lengths[places].tolist(), strict=True)
        return tuple(
            PlannedSample(position, self.dataset_names[dataset], index, epoch, *lengths, variant=variant)
            for position, dataset, index, epoch, variant, lengths in rows
        )


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of a window; its samples are made when they are asked for."""

    window: Window
    number: int

    @property
    def samples(self) -> tuple[PlannedSample, ...]:
        """The samples of the row, by position."""
        return self.window.samples(self.window.members[self.window.starts[self.number] : self.window.starts[self.number + 1]])

    @property
    def cost(self) -> float:
        """Estimated cost, see `RowCosts`."""
        return float(self.window.costs[self.number])


def _spread(costs: np.ndarray, key: int) -> np.ndarray:
    """An order of rows in which every stretch, however long, holds cheap and costly ones as the whole window does.

    Rows with one long document and rows of many short samples thus come mixed, and steps of the same number of rows take
    about the same time. Neither needs to know how many rows a step has.

    Args:
        costs: float64[R].
        key: Where the order begins.

    Returns:
        int64[R], the place of each row.

    Source: multiples of the golden ratio modulo 1 leave gaps of at most three lengths at any time: Swierczkowski, "On
        successive settings of an arc on the circumference of a circle" (1958).
    """
    numbers = np.arange(len(costs), dtype=np.uint64)
    points = numbers * np.uint64(_GOLDEN_RATIO) + np.uint64(derive_key(key, 0))
    places = np.empty(len(costs), dtype=np.int64)
    places[np.argsort(costs, kind="stable")] = np.argsort(points, kind="stable")
    return places
