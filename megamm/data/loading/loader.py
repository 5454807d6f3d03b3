"""The loader: the batches of each step, decoded ahead of it.

One thread plans and collates, decoders read and decode. What is decoded ahead is bounded in steps and in bytes. Every error
of every thread reaches whoever asks for the next step, after the steps that were ready before it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType

from megamm.core.errors import ConfigError
from megamm.core.types import Batch, PackedRow, TokenSequence
from megamm.data.ledger import EXCLUDED, Skipped
from megamm.data.loading.arena import SampleBytes
from megamm.data.loading.budget import Budget
from megamm.data.loading.collate import batch_bytes, collate
from megamm.data.loading.decoders import JOIN_SECONDS, RowJob, closed
from megamm.data.loading.exclusions import excluded_samples
from megamm.data.loading.open_decoders import open_decoders
from megamm.data.loading.source import SampleName, SampleSource
from megamm.data.planning.deal import deal, resolve_accumulation
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.rows import PlannedRow, PlannedSample
from megamm.data.planning.state import LoaderState
from megamm.data.samples.encode import SampleEncoder
from megamm.data.shards.reader import Reader

_BATCH_TOKEN_BYTES = 4 * 8 + 4


@dataclass
class StepData:
    """One step of one rank.

    Attributes:
        step: Number of the step, from 1.
        micro_batches: This rank's micro-batches in order.
        skipped: Samples of this step that this rank must answer for and did not deliver; those of all ranks together are all.
        state: What resuming after this step needs; the same on all ranks.
        rows: The rows of all ranks in their global order.
        num_bytes: Size of the arrays of the micro-batches.
        slots: This rank's samples by micro-step and row, skipped ones included.
    """

    step: int
    micro_batches: list[Batch]
    skipped: list[Skipped]
    state: LoaderState
    rows: list[PlannedRow]
    num_bytes: int
    slots: list[list[tuple[PlannedSample, ...]]]
    _source: SampleSource

    def own_samples(self) -> list[SampleName]:
        """The samples of this rank, skipped ones included, by micro-step and row."""
        places = ((micro_step, row, sample) for micro_step, rows in enumerate(self.slots) for row, one in enumerate(rows) for sample in one)
        return [self._source.name(sample, micro_step, row) for micro_step, row, sample in places]

    @cached_property
    def keys(self) -> list[str]:
        """`dataset/key` of every planned sample of all ranks, in the plan's order; the same on all ranks.

        Looked up when asked for: at scale only one rank needs them, if any.
        """
        return [self._source.key(sample) for row in self.rows for sample in row.samples]

    @property
    def num_samples(self) -> int:
        """Planned samples of all ranks."""
        return sum(int(row.window.starts[row.number + 1] - row.window.starts[row.number]) for row in self.rows)


class StepLoader:
    """Iterator over the steps of a run, endless; a context manager.

    State: `StepData.state`, the same on all ranks. A loader started from it delivers the same global batches as one that
    never stopped, at any world size, accumulation, kind and number of decoders, and prefetch depth.

    Budget: each rank holds what it failed to decode, and an equal share of the samples that no row holds, against the samples
    that it planned. What the run skipped and planned before is counted where its ledger is handed in, an equal share a rank.
    Every sample that is skipped is logged as a warning, the first time and by the rank that answers for it.
    """

    def __init__(
        self,
        plan: DataPlan,
        *,
        rank: int = 0,
        world_size: int = 1,
        state: LoaderState | None = None,
        task_weights: Mapping[str, float] | None = None,
        reader: Reader | None = None,
        ledger: Sequence[Skipped] | None = None,
    ) -> None:
        """Start decoding.

        Args:
            plan: What to load.
            rank: This rank.
            world_size: All ranks.
            state: Where to go on; None for the beginning.
            task_weights: Task name -> loss weight of its tokens; 1 where not named.
            reader: Where bytes come from; what `data.reading` says by default.
            ledger: What all ranks together skipped up to `state`; None begins a fresh budget.

        Raises:
            ConfigError: The batch cannot be dealt to the ranks, or weights name a task that the data do not have.
            DataError: The state belongs to other data or another plan.
        """
        weights = dict(task_weights or {})
        if unknown := sorted(set(weights) - set(plan.tasks)):
            raise ConfigError(f"loss.task_weights names {unknown[0]!r}, which no sample has; the tasks are: {', '.join(plan.tasks)}")
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self._accumulation = resolve_accumulation(plan.batch, world_size)
        self._state = plan.start() if state is None else plan.resume(state)
        self._excluded: frozenset[tuple[str, int]] = frozenset()
        self._pad_id = plan.tokenizer.vocabulary.control_id("pad")
        self._sizes = SampleBytes.of(plan.rules)
        self._budget = Budget(
            plan.data.max_skipped_share,
            plan.data.max_skipped_in_a_row,
            num_planned=0.0 if ledger is None else self._state.plan.position / world_size,
            num_skipped=sum(entry.reason != EXCLUDED for entry in ledger or ()) / world_size,
        )
        self._source, self._decoders = open_decoders(
            plan.data,
            plan.datasets,
            SampleEncoder(plan.tokenizer, plan.rules, weights),
            augment={name: dataset.augment for name, dataset in plan.data.train.items()},
            seed=plan.seed,
            reader=reader,
        )
        self._changed = threading.Condition()
        self._ready: deque[StepData] = deque()
        self._pending: deque[_Pending] = deque()
        self._num_held = self._bytes_held = self._bytes_given = 0
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> StepData:
        with self._changed:
            # Whoever asks for the next step lets go of the last one.
            self._bytes_held -= self._bytes_given
            self._bytes_given = 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise closed()
            if not self._ready:
                assert self._error is not None, "woken without a step or an error"
                raise self._error
            step = self._ready.popleft()
            self._num_held -= 1
            self._bytes_given = step.num_bytes
            self._changed.notify_all()
            return step

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop all threads and processes and release all files, whatever hangs; may be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._decoders.close()
        # Planning looks at indexes, on storage that may not answer; a daemon thread may stay behind there.
        self._thread.join(JOIN_SECONDS)
        self._source.close()

    def awaited(self) -> list[SampleName]:
        """What the next step still waits for, the first sample first; for whoever asks why it does not come, from any thread."""
        try:
            oldest = self._pending[0]
        except IndexError:
            return []
        jobs = ((micro_step, row, one.job) for micro_step, rows in enumerate(oldest.rows) for row, one in enumerate(rows))
        return [
            self._source.name(sample, micro_step, row)
            for micro_step, row, job in jobs
            if not job.done.is_set()
            for sample, outcome in zip(job.samples, tuple(job.outcomes), strict=False)
            if outcome is None
        ]

    def _run(self) -> None:
        """Admit steps while there is room, finish the oldest otherwise."""
        planned = None
        try:
            # Here, not where the loader is made: it looks at indexes, on storage that may not answer.
            self._excluded = excluded_samples(self._state.exclusions, self._plan.datasets)
            while not self._closed:
                planned = planned or self._plan_step()
                if self._admit(planned, wait=not self._pending):
                    self._pending.append(_Pending(planned, [[self._submit(row) for row in step] for step in planned.slots]))
                    planned = None
                elif self._pending:
                    step = self._finish(self._pending[0])
                    self._pending.popleft()
                    with self._changed:
                        self._ready.append(step)
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _plan_step(self) -> _Planned:
        step = self._plan.next_step(self._state)
        self._state = step.state
        hands = deal(step.rows, self._world_size, self._plan.batch.micro_rows, self._accumulation)
        mine = [[() if row is None else row.samples for row in slots] for slots in hands[self._rank]]
        unfit = [sample for sample in step.unfit if not self._is_excluded(sample)]
        # All ranks see what no row holds; one of them answers for each.
        skipped = [
            self._source.skipped(sample, EXCLUDED if self._is_excluded(sample) else self._plan.unfit_reason(sample))
            for sample in step.unfit
            if sample.position % self._world_size == self._rank
        ]
        return _Planned(step.rows, mine, skipped, len(unfit), self._state, self._planned_bytes(mine))

    def _is_excluded(self, sample: PlannedSample) -> bool:
        return (sample.dataset, sample.index) in self._excluded

    def _planned_bytes(self, slots: list[list[tuple[PlannedSample, ...]]]) -> int:
        """Of a step's batches, and of its decoded rows, which exist beside them while it is collated (in the decoders' arena if any)."""
        rows = [row for step in slots for row in step]
        media = replace(self._sizes, token=0)
        batches = len(rows) * self._plan.batch.row_tokens * _BATCH_TOKEN_BYTES + sum(media.row(row) for row in rows)
        return batches if self._decoders.arena_bytes else batches + sum(self._sizes.row(row) for row in rows)

    def _admit(self, planned: _Planned, *, wait: bool) -> bool:
        """Take the room for a step; a step that is larger than all room is admitted alone."""

        def has_room() -> bool:
            data = self._plan.data
            num_bytes = self._bytes_held + planned.num_bytes + self._decoders.arena_bytes
            return not self._num_held or (self._num_held < data.prefetch_steps and num_bytes <= data.prefetch_bytes)

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: has_room() or self._closed)
            if self._closed or not has_room():
                return False
            self._num_held += 1
            self._bytes_held += planned.num_bytes
            return True

    def _submit(self, row: tuple[PlannedSample, ...]) -> _RowInHand:
        """Have a row decoded, but for what is kept out: that is not even read."""
        excluded = {number for number, sample in enumerate(row) if self._is_excluded(sample)} if self._excluded else set()
        job = self._decoders.submit([sample for number, sample in enumerate(row) if number not in excluded])
        return _RowInHand(row, job, excluded)

    def _outcomes(self, row: _RowInHand) -> list[TokenSequence | Skipped]:
        decoded = iter(self._decoders.result(row.job))
        return [
            self._source.skipped(sample, EXCLUDED) if number in row.excluded else next(decoded) for number, sample in enumerate(row.samples)
        ]

    def _finish(self, pending: _Pending) -> StepData:
        planned, results = pending.planned, []
        micro_batches = []
        for rows in pending.rows:
            outcomes = [self._outcomes(row) for row in rows]
            sequences = [[one for one in row if isinstance(one, TokenSequence)] for row in outcomes]
            micro_batches.append(
                collate(
                    [PackedRow(row) for row in sequences],
                    self._plan.batch.row_tokens,
                    self._pad_id,
                    self._plan.tasks,
                    head=self._plan.rules.head,
                )
            )
            results += [one if isinstance(one, Skipped) else None for row in outcomes for one in row]
            # Nothing may hold a view of a row's arrays when its memory is given to another row.
            del outcomes, sequences
            for row in rows:
                self._decoders.release(row.job)
        # A mixture may put a dataset's samples on the positions of few ranks: the budget takes an equal share, not this rank's.
        self._budget.charge(results, unfit=planned.skipped, num_unfit=planned.num_unfit / self._world_size)
        skipped = planned.skipped + [entry for entry in results if entry is not None]
        num_bytes = sum(map(batch_bytes, micro_batches))
        with self._changed:
            # What was planned knows nothing of the padding of pictures and sounds to a common size, but held the decoded rows.
            self._bytes_held += num_bytes - planned.num_bytes
        return StepData(planned.state.step, micro_batches, skipped, planned.state, planned.rows, num_bytes, planned.slots, self._source)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A step of this rank before it is decoded; `slots` are samples by micro-step and row, `num_unfit` counts those of all ranks."""

    rows: list[PlannedRow]
    slots: list[list[tuple[PlannedSample, ...]]]
    skipped: list[Skipped]
    num_unfit: int
    state: LoaderState
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _RowInHand:
    """A row with decoders; they got all samples but the `excluded` ones (numbers within the row)."""

    samples: tuple[PlannedSample, ...]
    job: RowJob
    excluded: set[int]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step with decoders, its rows by micro-step."""

    planned: _Planned
    rows: list[list[_RowInHand]]
