"""The loader: the batches of each step, decoded ahead of it.

One thread plans and collates, others read and decode. What is decoded ahead is bounded in steps and in bytes. Every error
of every thread reaches whoever asks for the next step, after the steps that were ready before it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

from megamm.core.errors import ConfigError, DataError
from megamm.core.logging import get_logger
from megamm.core.types import Batch, PackedRow, TokenSequence
from megamm.data.collate import collate
from megamm.data.deal import deal, resolve_accumulation
from megamm.data.encode import SampleEncoder
from megamm.data.features import MediaRules
from megamm.data.ledger import Skipped, check_budget
from megamm.data.plan import DataPlan
from megamm.data.reader import LocalReader, Reader
from megamm.data.rows import PlannedRow, PlannedSample
from megamm.data.source import SampleSource
from megamm.data.state import LoaderState

_log = get_logger("data")
_STUCK_SECONDS = 300.0
_TOKEN_BYTES = 5 * 8


@dataclass
class StepData:
    """One step of one rank.

    Attributes:
        step: Number of the step, from 1.
        micro_batches: This rank's micro-batches in order.
        skipped: Samples of this step that this rank must answer for and did not deliver; those of all ranks together are all.
        state: What resuming after this step needs; the same on all ranks.
        rows: The rows of all ranks in their global order.
        num_bytes: Size of the micro-batches as it was planned.
    """

    step: int
    micro_batches: list[Batch]
    skipped: list[Skipped]
    state: LoaderState
    rows: list[PlannedRow]
    num_bytes: int
    _source: SampleSource

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
    never stopped, at any world size, accumulation, number of threads and prefetch depth.

    Budget: each rank holds what it failed to decode, and an equal share of the samples that no row holds, against the samples
    that it planned. It is counted from where this loader started: a resumed run begins with a fresh budget. Every sample that
    is skipped is logged as a warning, the first time and by the rank that answers for it.
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
    ) -> None:
        """Start decoding.

        Args:
            plan: What to load.
            rank: This rank.
            world_size: All ranks.
            state: Where to go on; None for the beginning.
            task_weights: Task name -> loss weight of its tokens; 1 where not named.
            reader: Where bytes come from; local files by default.

        Raises:
            ConfigError: The batch cannot be dealt to the ranks, or weights name a task that the data do not have.
            DataError: The state belongs to other data or another plan.
        """
        weights = dict(task_weights or {})
        if unknown := sorted(set(weights) - set(plan.tasks)):
            raise ConfigError(f"loss.task_weights names {unknown[0]!r}, which no sample has; the tasks are: {', '.join(plan.tasks)}")
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self._accumulation = resolve_accumulation(plan.batch, world_size)
        self._source = SampleSource(
            plan.datasets,
            SampleEncoder(plan.tokenizer, plan.rules, weights),
            reader or LocalReader(),
            augment={name: dataset.augment for name, dataset in plan.data.train.items()},
            seed=plan.seed,
        )
        self._state = plan.start() if state is None else plan.resume(state)
        self._excluded = frozenset(key for exclusion in self._state.exclusions for key in exclusion.keys)
        self._pad_id = plan.tokenizer.vocabulary.control_id("pad")
        self._num_planned = self._num_skipped = 0.0
        self._last_skipped: Skipped | None = None
        self._logged: set[tuple[str, str]] = set()

        self._changed = threading.Condition()
        self._ready: deque[StepData] = deque()
        self._num_held = self._bytes_held = 0
        self._error: BaseException | None = None
        self._closed = False
        self._decoders = ThreadPoolExecutor(plan.data.decode_workers, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> StepData:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise DataError("the loader is closed; open another one from the last state")
            if not self._ready:
                assert self._error is not None, "woken without a step or an error"
                raise self._error
            step = self._ready.popleft()
            self._num_held -= 1
            self._bytes_held -= step.num_bytes
            self._changed.notify_all()
            return step

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop all threads and release all files; may be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # A decoder that hangs would hang the exit as well; its thread is left behind only then.
        self._decoders.shutdown(wait=not isinstance(self._error, StuckDecoder), cancel_futures=True)
        self._thread.join()
        self._source.close()

    def _run(self) -> None:
        """Admit steps while there is room, finish the oldest otherwise."""
        pending: deque[_Pending] = deque()
        planned = None
        try:
            while not self._closed:
                planned = planned or self._plan_step()
                if self._admit(planned, wait=not pending):
                    pending.append(self._submit(planned))
                    planned = None
                elif pending:
                    step = self._finish(pending.popleft())
                    with self._changed:
                        self._ready.append(step)
                        self._changed.notify_all()
        except BaseException as error:
            # A cancelled future means that the loader was closed; the consumer does not wait any more.
            with self._changed:
                self._error = error if not isinstance(error, CancelledError) else DataError("the loader was closed")
                self._changed.notify_all()

    def _plan_step(self) -> _Planned:
        step = self._plan.next_step(self._state)
        self._state = step.state
        hands = deal(step.rows, self._world_size, self._plan.batch.micro_rows, self._accumulation)
        mine = [[() if row is None else row.samples for row in slots] for slots in hands[self._rank]]
        # All ranks see what no row holds; one of them answers for each.
        unfit = [sample for sample in step.unfit if sample.position % self._world_size == self._rank]
        skipped = [self._source.skipped(sample, self._plan.unfit_reason(sample)) for sample in unfit]
        return _Planned(step.rows, mine, skipped, len(step.unfit), self._state, self._num_bytes(mine))

    def _num_bytes(self, slots: list[list[tuple[PlannedSample, ...]]]) -> int:
        rows = [row for step in slots for row in step]
        samples = [sample for row in rows for sample in row]
        per_patch, per_frame = media_bytes(self._plan.rules)
        num_patches, num_frames = sum(sample.patches for sample in samples), sum(sample.frames for sample in samples)
        return len(rows) * self._plan.batch.row_tokens * _TOKEN_BYTES + num_patches * per_patch + num_frames * per_frame

    def _admit(self, planned: _Planned, *, wait: bool) -> bool:
        """Take the room for a step; a step that is larger than all room is admitted alone."""

        def has_room() -> bool:
            data = self._plan.data
            return not self._num_held or (
                self._num_held < data.prefetch_steps and self._bytes_held + planned.num_bytes <= data.prefetch_bytes
            )

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: has_room() or self._closed)
            if self._closed or not has_room():
                return False
            self._num_held += 1
            self._bytes_held += planned.num_bytes
            return True

    def _submit(self, planned: _Planned) -> _Pending:
        futures = [
            [[(sample, self._decoders.submit(self._source.load, sample, self._excluded)) for sample in row] for row in step]
            for step in planned.slots
        ]
        return _Pending(planned, futures)

    def _finish(self, pending: _Pending) -> StepData:
        planned, failed = pending.planned, []
        # A mixture may put a dataset's samples on the positions of few ranks: the budget takes an equal share, not this rank's.
        num_unfit = planned.num_unfit / self._world_size
        num_planned = num_unfit
        micro_batches = []
        for step in pending.futures:
            rows = []
            for row in step:
                results = [self._result(sample, future) for sample, future in row]
                failed += [result for result in results if isinstance(result, Skipped)]
                rows.append(PackedRow([result for result in results if isinstance(result, TokenSequence)]))
                num_planned += len(results)
            micro_batches.append(collate(rows, self._plan.batch.row_tokens, self._pad_id, self._plan.tasks))
        skipped = planned.skipped + failed
        self._num_planned += num_planned
        self._num_skipped += num_unfit + len(failed)
        self._note(skipped)
        check_budget(self._num_skipped, self._num_planned, self._plan.data.max_skipped_share, last=self._last_skipped)
        return StepData(planned.state.step, micro_batches, skipped, planned.state, planned.rows, planned.num_bytes, self._source)

    def _note(self, skipped: list[Skipped]) -> None:
        """Warn of samples that this rank skips, once each however many epochs there are."""
        for entry in skipped:
            self._last_skipped, name = entry, (entry.dataset, entry.key)
            if name not in self._logged:
                self._logged.add(name)
                _log.warning("skipped %s/%s in %s: %s", entry.dataset, entry.key, entry.shard, entry.reason)

    def _result(self, sample: PlannedSample, future: Future[TokenSequence | Skipped]) -> TokenSequence | Skipped:
        try:
            return future.result(timeout=_STUCK_SECONDS)
        except FutureTimeoutError:
            tar, _ = self._source.datasets[sample.dataset].locate(sample.index)
            raise StuckDecoder(
                f"decoding {self._source.key(sample)} in {tar} takes more than {_STUCK_SECONDS:.0f} s; exclude the sample"
            ) from None


class StuckDecoder(DataError):
    """A sample whose decoding does not end."""


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
class _Pending:
    planned: _Planned
    futures: list[list[list[tuple[PlannedSample, Future[TokenSequence | Skipped]]]]]


def media_bytes(rules: MediaRules) -> tuple[int, int]:
    """Bytes that a planned patch and a planned frame take, decoded and collated."""
    per_patch = per_frame = 0
    if rules.image is not None and rules.image.kind == "naflex":
        per_patch = 2 * 4 * 3 * rules.image.patch_size**2
    elif rules.image is not None:
        per_patch = 2 * 4 * 3 * (rules.image.stride * rules.image.merge) ** 2
    if rules.audio is not None:
        per_frame = 2 * 4 * rules.audio.num_mel
    return per_patch, per_frame
