"""The plan: which samples make up which rows, as a pure function of shards, settings and a place.

Positions are numbered once for the whole run. The mixture says which dataset a position belongs to, the order which sample
stands there, and packing turns every window of positions into rows. Rows are taken in a shuffled order within their window.
Nothing here depends on ranks, threads or what was read, so every rank plans the same, and any place is found at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from megamm.config import Batching, Data, Model
from megamm.core.errors import ConfigError, DataError
from megamm.core.files import canonical_json, digest_text
from megamm.core.logging import get_logger
from megamm.data.datasets import ShardSet, open_dataset
from megamm.data.features import MediaRules
from megamm.data.lengths import lengths_key
from megamm.data.mixture import Mixture, integer_weights
from megamm.data.order import derive_key, sample_at
from megamm.data.rows import DEFAULT_COSTS, PlannedRow, PlannedSample, RowCosts, Window
from megamm.data.state import LoaderState, PlanState, check_identity
from megamm.tokenizers.text import TextTokenizer

_MAX_EMPTY_WINDOWS = 100

_log = get_logger("data")


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The rows of a step.

    Attributes:
        rows: In their global order.
        unfit: Samples of the windows that this step opened which no row holds; they go to the ledger.
        state: What resuming after this step needs.
    """

    rows: list[PlannedRow]
    unfit: tuple[PlannedSample, ...]
    state: LoaderState


class DataPlan:
    """The training data of a run, planned. Stateless: `next_step` is a function of the place that it is given.

    Attributes:
        datasets: By name, sorted.
        identity: Name -> value of everything that the plan is made from; two plans with equal identities are the same plan.
        fingerprint: Digest of `identity`.
        tasks: Sorted names of the tasks that occur.
        data: The recipe's data settings.
        batch: The recipe's batch settings.
        rules: How media become tower inputs.
        tokenizer: Of the run.
        seed: Of the run.
    """

    def __init__(
        self,
        datasets: Sequence[ShardSet],
        data: Data,
        batch: Batching,
        *,
        rules: MediaRules,
        tokenizer: TextTokenizer,
        seed: int,
        costs: RowCosts = DEFAULT_COSTS,
    ) -> None:
        self.datasets = {dataset.name: dataset for dataset in sorted(datasets, key=lambda dataset: dataset.name)}
        self.data, self.batch, self.rules, self.tokenizer = data, batch, rules, tokenizer
        self.tasks = tuple(sorted({task for dataset in datasets for task in dataset.task_names}))
        self.identity = _identity(self.datasets, data, batch, key=lengths_key(tokenizer, rules), seed=seed)
        self.fingerprint = digest_text(canonical_json(self.identity))
        self._names = tuple(self.datasets)
        self._sets = tuple(self.datasets.values())
        self._seeds = {name: xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) for name in self._names}
        self.seed = seed
        self._row_seed = xxhash.xxh3_64_intdigest(f"{seed}".encode())
        self._costs = costs
        self._last: tuple[object, Window] | None = None

    @classmethod
    def open(
        cls,
        data: Data,
        batch: Batching,
        *,
        model: Model,
        tokenizer: TextTokenizer,
        seed: int,
        costs: RowCosts = DEFAULT_COSTS,
    ) -> DataPlan:
        """Open the training datasets of a recipe; their lengths must have been planned (`lengths.ensure_lengths`).

        Raises:
            ConfigError: The recipe names no training data.
            DataError: Shards, indexes or lengths are missing, damaged or changed.
        """
        if not data.train:
            raise ConfigError("data.train is empty; name at least one dataset, such as data.train.digits.shards")
        rules = MediaRules.of(model, data)
        key = lengths_key(tokenizer, rules)
        datasets = [open_dataset(name, dataset, Path(data.root), key) for name, dataset in data.train.items()]
        return cls(datasets, data, batch, rules=rules, tokenizer=tokenizer, seed=seed, costs=costs)

    def start(self) -> LoaderState:
        """The state before the first step."""
        return LoaderState(0, PlanState(0, 0, Mixture.start(self._weights()).segments), self.identity)

    def resume(self, state: LoaderState) -> LoaderState:
        """Check that a saved state belongs to this plan; weights that the recipe changed hold from the next whole window on.

        Raises:
            DataError: The state belongs to other data or another plan.
        """
        check_identity(state.identity, self.identity)
        if state.plan.segments[-1].weights == self._weights():
            return state
        first = (state.plan.window + (state.plan.row > 0)) * self.data.window
        segments = Mixture(state.plan.segments).changed(self._weights(), first).segments
        _log.info("data weights %s hold from position %d on", dict(zip(self._names, self._weights(), strict=True)), first)
        return replace(state, plan=replace(state.plan, segments=segments))

    def next_step(self, state: LoaderState) -> PlannedStep:
        """The step after a state: the one function that leads from step to step.

        Args:
            state: From `start`, `resume` or the step before.

        Raises:
            DataError: Window after window holds no sample that fits a row.
        """
        rows, unfit, place = self._take(state.plan, self.batch.global_rows)
        return PlannedStep(rows, unfit, replace(state, step=state.step + 1, plan=place))

    def _take(self, state: PlanState, num_rows: int) -> tuple[list[PlannedRow], tuple[PlannedSample, ...], PlanState]:
        """The next `num_rows` rows, what no row of the windows opened for them holds, and where to go on."""
        rows: list[PlannedRow] = []
        unfit: list[PlannedSample] = []
        number, row, num_empty = state.window, state.row, 0
        while len(rows) < num_rows:
            window = self._window(number, state)
            if row == 0:
                unfit += window.samples(window.unfit)
            end = min(row + num_rows - len(rows), window.num_rows)
            rows += [PlannedRow(window, each) for each in range(row, end)]
            row = end
            if row == window.num_rows:
                number, row = number + 1, 0
            num_empty = 0 if window.num_rows else num_empty + 1
            if num_empty == _MAX_EMPTY_WINDOWS:
                raise DataError(
                    f"no sample among {num_empty * self.data.window} positions fits a row: {self.unfit_reason(unfit[-1])}; "
                    "look at the data, or raise batch.row_tokens, data.row_patches or data.row_frames"
                )
        return rows, tuple(unfit), PlanState(number, row, state.segments)

    def unfit_reason(self, sample: PlannedSample) -> str:
        """Why no row holds a sample."""
        if not sample.tokens:
            return self.datasets[sample.dataset].problem(sample.index)
        return (
            f"takes {sample.tokens} tokens, {sample.patches} patches and {sample.frames} frames, "
            f"a row holds {self.batch.row_tokens}, {self.data.row_patches} and {self.data.row_frames}"
        )

    def _weights(self) -> tuple[int, ...]:
        return integer_weights([self.data.train[name].weight for name in self._names])

    def _window(self, number: int, state: PlanState) -> Window:
        """One window; the last one is kept, because the next step mostly goes on in it."""
        last, key = self._last, (number, state.segments)
        if last is not None and last[0] == key:
            return last[1]
        first = number * self.data.window
        window = self._plan(np.arange(first, first + self.data.window), Mixture(state.segments), derive_key(self._row_seed, number))
        self._last = key, window
        return window

    def _plan(self, positions: np.ndarray, mixture: Mixture, row_key: int) -> Window:
        datasets, places = mixture.locate(positions)
        indices, epochs = np.empty_like(places), np.empty_like(places)
        lengths = np.empty((len(positions), 3), dtype=np.int32)
        for number, dataset in enumerate(self._sets):
            mine = np.flatnonzero(datasets == number)
            if mine.size:
                epochs[mine], within = np.divmod(places[mine], dataset.num_samples)
                indices[mine] = self._ordered(dataset, within, epochs[mine])
                lengths[mine] = dataset.lengths[indices[mine]]
        return Window.pack(
            self._names,
            positions,
            datasets=datasets,
            indices=indices,
            epochs=epochs,
            lengths=lengths,
            capacity=(self.batch.row_tokens, self.data.row_patches, self.data.row_frames),
            costs=self._costs,
            row_key=row_key,
        )

    def _ordered(self, dataset: ShardSet, within: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Samples at positions of a dataset; a window rarely holds more than one epoch of it."""
        indices = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            these = epochs == epoch
            indices[these] = sample_at(
                within[these],
                num_samples=dataset.num_samples,
                block=self.data.shuffle_block,
                window=self.data.shuffle_window,
                seed=self._seeds[dataset.name],
                epoch=epoch,
            )
        return indices


def _identity(datasets: dict[str, ShardSet], data: Data, batch: Batching, *, key: str, seed: int) -> dict[str, str]:
    settings = {
        "seed": seed,
        "data.window": data.window,
        "data.shuffle_block": data.shuffle_block,
        "data.shuffle_window": data.shuffle_window,
        "data.row_patches": data.row_patches,
        "data.row_frames": data.row_frames,
        "batch.row_tokens": batch.row_tokens,
        "tokenizer and media settings": key,
    }
    return {**{name: str(value) for name, value in settings.items()}, **{f"dataset {name}": one.digest for name, one in datasets.items()}}
