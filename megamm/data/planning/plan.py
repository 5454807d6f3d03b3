"""The plan: which samples make up which rows, as a pure function of shards, settings and a place.

Positions are numbered once for the whole run. The mixture says which dataset a position belongs to, the order which sample
stands there, and packing turns every window of positions into rows, which are taken in an order that spreads them by cost.
Nothing here depends on ranks, threads or what was read, so every rank plans the same, and any place is found at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import xxhash

from megamm.config import Augment, Batching, Data, Model
from megamm.core.errors import ConfigError, DataError
from megamm.core.files import canonical_json
from megamm.core.logging import get_logger
from megamm.data.keyed import derive_key
from megamm.data.media.features import MediaRules
from megamm.data.planning.mixture import Mixture, Segment, planned_weights
from megamm.data.planning.order import sample_at, variants_at
from megamm.data.planning.rows import DEFAULT_COSTS, PlannedRow, PlannedSample, RowCosts, Window
from megamm.data.planning.state import DataChange, LoaderState, Pass, PlanState, check_identity, differences, fingerprint_of
from megamm.data.planning.stretch import Stretch
from megamm.data.samples.datasets import ShardSet, open_dataset
from megamm.data.samples.lengths import lengths_key
from megamm.tokenizers.text import TextTokenizer

PLAN_VERSION = 2
"""Raised whenever equal settings give other rows: a state from before is then refused, not continued with other samples."""
_MAX_EMPTY_WINDOWS = 100
_MAX_EMPTY_POSITIONS = 100_000
"""Both must be reached: a hundred windows may be a hundred samples, and a hundred thousand samples one window."""
_PLAIN = asdict(Augment())

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
        self.identity = _identity(self.datasets, data, batch, key=lengths_key(tokenizer, rules), seed=seed, costs=costs)
        self.fingerprint = fingerprint_of(self.identity)
        self._weights = planned_weights(data)
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
            ConfigError: The recipe names no training data, or a mapping contradicts itself.
            DataError: Shards, indexes or lengths are missing, damaged or changed.
        """
        if not data.train:
            raise ConfigError("data.train is empty; name at least one dataset, such as data.train.digits.shards")
        rules = MediaRules.of(model, data)
        datasets = [
            open_dataset(name, dataset, data, tokenizer=tokenizer, rules=rules, speeds=dataset.augment.audio_speeds)
            for name, dataset in data.train.items()
        ]
        return cls(datasets, data, batch, rules=rules, tokenizer=tokenizer, seed=seed, costs=costs)

    def start(self) -> LoaderState:
        """The state before the first step."""
        first, *later = self._weights
        plan = PlanState(0, 0, 0, self._names, Mixture.start(first.weights).segments, tuple(later), (Pass(),) * len(self._names))
        return LoaderState(0, plan, self.identity)

    def resume(self, state: LoaderState, *, accept_change: bool = False) -> LoaderState:
        """The state to go on from, under the weights of this plan's recipe.

        Weights that changed hold from the next whole window on. Other data or settings are refused, or recorded and gone on
        with: from the next whole window on, each dataset at its place. A dataset whose shards or order changed begins a new
        pass, because places of the old order mean nothing in the new one; one that is new begins its first.

        Args:
            state: Of the checkpoint.
            accept_change: Go on although shards or settings differ from those of the state.

        Raises:
            DataError: The state belongs to other data or another plan, and that is not accepted.
        """
        if dict(state.identity) != self.identity:
            if not accept_change:
                check_identity(state.identity, self.identity)
            state = self._moved(state)
        past, later = ([one for one in self._weights if (one.step <= state.plan.num_steps) == is_past] for is_past in (True, False))
        plan = replace(state.plan, schedule=tuple(later))
        if plan.segments[-1].weights != past[-1].weights:
            plan = self._reweighted(plan, past[-1].weights)
        return replace(state, plan=plan)

    def _moved(self, state: LoaderState) -> LoaderState:
        """A state of another plan, carried over to this one."""
        old, changed = state.plan, differences(state.identity, self.identity)
        first = old.position + (old.row > 0) * int(state.identity["data.window"])
        drawn = dict(zip(old.names, Mixture(old.segments).drawn(first), strict=True))
        passes = dict(zip(old.names, old.passes, strict=True))
        is_reordered = not {"seed", "data.shuffle_block", "data.shuffle_window"}.isdisjoint(changed)
        for name in passes:
            if is_reordered or f"shards of {name}" in changed:
                size = int(state.identity[f"samples of {name}"])
                passes[name] = Pass(drawn[name], passes[name].epoch - (passes[name].drawn - drawn[name]) // size)
        # Weights are compared, and changed where they differ, by `resume`.
        weights = dict(zip(old.names, old.segments[-1].weights, strict=True))
        segment = Segment(first, *(tuple(one.get(name, 0) for name in self._names) for one in (weights, drawn)))
        passes_now = tuple(passes.get(name, Pass()) for name in self._names)
        plan = PlanState(first, 0, old.num_steps, self._names, (segment,), (), passes_now)
        change = DataChange(state.step, first, old.position, old.row, state.fingerprint, self.fingerprint, changed)
        _log.warning("accepted: %s", change)
        return replace(state, plan=plan, identity=self.identity, changes=(*state.changes, change))

    def _reweighted(self, plan: PlanState, weights: tuple[int, ...]) -> PlanState:
        first = plan.position + (plan.row > 0) * self.data.window
        _log.info("data weights %s hold from position %d on", dict(zip(self._names, weights, strict=True)), first)
        return replace(plan, segments=Mixture(plan.segments).changed(weights, first).segments)

    def next_step(self, state: LoaderState) -> PlannedStep:
        """The step after a state: the one function that leads from step to step.

        It reads the state and the data alone, not the recipe's weights: what `resume` recorded is what holds. Steps of data that
        are left out are planned and passed over.

        Args:
            state: From `start`, `resume`, `leave_out` or the step before.

        Raises:
            DataError: Window after window holds no sample that fits a row.
        """
        left_out = [stretch for stretch in state.stretches if stretch.plan == self.fingerprint]
        rows, unfit, place = self._next_rows(state.plan)
        while any(place.num_steps in stretch for stretch in left_out):
            rows, more, place = self._next_rows(place)
            unfit += more
        return PlannedStep(rows, unfit, replace(state, step=state.step + 1, plan=place))

    def leave_out(self, state: LoaderState, first: int, last: int, *, reason: str, from_step: int = 0, to_step: int = 0) -> LoaderState:
        """A state whose next steps leave out some data that are not delivered yet.

        Args:
            state: Where to go on.
            first: First step of data to leave out, as `PlanState.num_steps` counts.
            last: The last one.
            reason: Why, in one line.
            from_step: Step that the run had reached, where it went back.
            to_step: Step that it went back to.

        Raises:
            ConfigError: The steps are none, or some of them are behind the state.
        """
        if not state.plan.num_steps < first <= last:
            raise ConfigError(
                f"data of steps {first} to {last} cannot be left out after step {state.plan.num_steps}; name later steps, in order"
            )
        before = self._after(state.plan, first - 1)
        after = self._after(before, last)
        places = (before.position, before.row), (after.position, after.row)
        stretch = Stretch(first, last, *places, plan=self.fingerprint, reason=reason, from_step=from_step, to_step=to_step)
        return state.leaving_out([stretch])

    def _after(self, place: PlanState, num_steps: int) -> PlanState:
        """The place after so many steps of data."""
        while place.num_steps < num_steps:
            *_, place = self._next_rows(place)
        return place

    def _next_rows(self, plan: PlanState) -> tuple[list[PlannedRow], tuple[PlannedSample, ...], PlanState]:
        """Rows, unfit samples and end of the next step of data."""
        while plan.schedule and plan.schedule[0].step <= plan.num_steps + 1:
            plan = self._reweighted(replace(plan, schedule=plan.schedule[1:]), plan.schedule[0].weights)
        return self._take(replace(plan, num_steps=plan.num_steps + 1), self.batch.global_rows)

    def _take(self, state: PlanState, num_rows: int) -> tuple[list[PlannedRow], tuple[PlannedSample, ...], PlanState]:
        """The next `num_rows` rows, what no row of the windows opened for them holds, and where to go on."""
        rows: list[PlannedRow] = []
        unfit: list[PlannedSample] = []
        first, row, num_empty = state.position, state.row, 0
        while len(rows) < num_rows:
            window = self._window(first, state)
            if row == 0:
                unfit += window.samples(window.unfit)
            end = min(row + num_rows - len(rows), window.num_rows)
            rows += [PlannedRow(window, each) for each in range(row, end)]
            row = end
            if row == window.num_rows:
                first, row = first + self.data.window, 0
            num_empty = 0 if window.num_rows else num_empty + 1
            if num_empty >= _MAX_EMPTY_WINDOWS and num_empty * self.data.window >= _MAX_EMPTY_POSITIONS:
                raise DataError(
                    f"no sample among {num_empty * self.data.window} positions fits a row: {self.unfit_reason(unfit[-1])}; "
                    "look at the data, or raise batch.row_tokens, data.row_patches or data.row_frames"
                )
        return rows, tuple(unfit), replace(state, position=first, row=row)

    def unfit_reason(self, sample: PlannedSample) -> str:
        """Why no row holds a sample."""
        if not sample.tokens:
            return self.datasets[sample.dataset].problem(sample.index)
        return (
            f"takes {sample.tokens} tokens, {sample.patches} patches and {sample.frames} frames, "
            f"a row holds {self.batch.row_tokens}, {self.data.row_patches} and {self.data.row_frames}"
        )

    def _window(self, first: int, state: PlanState) -> Window:
        """The window from a position on; the last one is kept, because the next step mostly goes on in it."""
        last, key = self._last, (first, state.segments, state.passes)
        if last is not None and last[0] == key:
            return last[1]
        window = self._plan(np.arange(first, first + self.data.window), state)
        self._last = key, window
        return window

    def _plan(self, positions: np.ndarray, state: PlanState) -> Window:
        datasets, places = Mixture(state.segments).locate(positions)
        indices, epochs, variants = np.empty_like(places), np.empty_like(places), np.zeros_like(places)
        lengths = np.empty((len(positions), 3), dtype=np.int32)
        for number, (dataset, origin) in enumerate(zip(self._sets, state.passes, strict=True)):
            mine = np.flatnonzero(datasets == number)
            if mine.size:
                passes, within = np.divmod(places[mine] - origin.drawn, dataset.num_samples)
                passes += origin.epoch
                epochs[mine], indices[mine] = passes, (chosen := self._ordered(dataset, within, passes))
                drawn = variants_at(self.seed, positions[mine], dataset.num_variants)
                variants[mine], lengths[mine] = drawn, dataset.lengths[chosen, drawn]
        return Window.pack(
            self._names,
            positions,
            datasets=datasets,
            indices=indices,
            epochs=epochs,
            lengths=lengths,
            capacity=(self.batch.row_tokens, self.data.row_patches, self.data.row_frames),
            costs=self._costs,
            row_key=derive_key(self._row_seed, int(positions[0])),
            variants=variants,
        )

    def _ordered(self, dataset: ShardSet, within: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Samples at positions of a dataset, which ascend; a window rarely holds more than one epoch of it."""
        first, last = int(epochs[0]), int(epochs[-1])
        return sample_at(
            within,
            num_samples=dataset.num_samples,
            block=self.data.shuffle_block,
            window=self.data.shuffle_window,
            seed=self._seeds[dataset.name],
            epoch=first if first == last else epochs.astype(np.uint64),
        )


def _identity(datasets: dict[str, ShardSet], data: Data, batch: Batching, *, key: str, seed: int, costs: RowCosts) -> dict[str, str]:
    settings = {
        "plan version": PLAN_VERSION,
        "seed": seed,
        "data.window": data.window,
        "data.shuffle_block": data.shuffle_block,
        "data.shuffle_window": data.shuffle_window,
        "data.row_patches": data.row_patches,
        "data.row_frames": data.row_frames,
        "batch.row_tokens": batch.row_tokens,
        "tokenizer and media settings": key,
        "row costs": canonical_json(asdict(costs)),
    }
    for name, one in datasets.items():
        settings |= {f"shards of {name}": one.shards_digest, f"samples of {name}": one.num_samples, f"lengths of {name}": one.digest}
        # Most of it moves no row, but what the rows hold is another batch.
        augment = asdict(data.train[name].augment)
        settings[f"augmentation of {name}"] = canonical_json({key: value for key, value in augment.items() if value != _PLAIN[key]})
    return {name: str(value) for name, value in settings.items()}
