"""Decoders: rows of planned samples in, their sequences or ledger entries out, ahead of whoever asks.

Two kinds do the same: threads of this process (here) and processes of their own (`decoder_processes`). A sample whose decoding does not
end costs that sample alone. Reading that does not end is the storage's trouble, never a sample's: it ends the run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megamm.core.errors import DataError, UnreachableData
from megamm.core.types import TokenSequence
from megamm.data.ledger import Skipped
from megamm.data.loading.source import SampleSource
from megamm.data.media.decode import log_mel
from megamm.data.media.features import MediaRules
from megamm.data.planning.rows import PlannedSample

MAX_STUCK_THREADS = 4
"""Threads that may hang at once: each keeps its memory, and maybe a processor, until the program ends."""

JOIN_SECONDS = 10.0
"""How long closing waits for a thread before it leaves it behind."""

_MAX_WATCH_SECONDS = 0.5
_MAX_GAP_SECONDS = 1.0
IDLE, READING, DECODING = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take.

    Attributes:
        decode_seconds: Decoding of one sample, then it is given up.
        read_seconds: Reading of one sample, retries included, then the run ends.
    """

    decode_seconds: float
    read_seconds: float

    @property
    def watch_seconds(self) -> float:
        """How often to look."""
        return min(self.decode_seconds / 4, self.read_seconds / 4, _MAX_WATCH_SECONDS)


@dataclass(eq=False, slots=True)
class RowJob:
    """A row on its way through decoders.

    Attributes:
        samples: What to decode.
        outcomes: For each sample its sequence or its ledger entry; None while it is under way.
        error: What ends the run, if anything does.
        is_awaited: Somebody waits for it, and releases nothing before it is done.
        done: Set when there is an error, or an outcome for each sample.
    """

    samples: tuple[PlannedSample, ...]
    outcomes: list[TokenSequence | Skipped | None]
    error: BaseException | None = None
    is_awaited: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, samples: Sequence[PlannedSample]) -> RowJob:
        """A job that nobody has begun."""
        return cls(tuple(samples), [None] * len(samples))

    def finish(self, error: BaseException | None = None) -> None:
        """Say that nothing more will happen to it; what is said first holds."""
        if not self.done.is_set():
            self.error = error
            self.done.set()


class Decoders(Protocol):
    """What decodes rows. Jobs are begun in the order in which they were submitted; whoever takes results takes them in that order.

    Attributes:
        arena_bytes: Memory of its own for decoded rows; 0 where they take whatever they need.
    """

    arena_bytes: int

    def submit(self, samples: Sequence[PlannedSample]) -> RowJob:
        """Queue a row."""
        ...

    def result(self, job: RowJob) -> list[TokenSequence | Skipped]:
        """Wait for a row. Its arrays may be views of shared memory: copy what shall outlive `release`.

        Raises:
            DataError: A shard cannot be read, decoders fail again and again, or `close` was called.
        """
        ...

    def release(self, job: RowJob) -> None:
        """Say that the arrays of a row are not needed any more."""
        ...

    def close(self) -> None:
        """Stop all of it; never waits long, whatever hangs. May be called again."""
        ...


class Watch:
    """How long something has been seen at the same place. State: the place, and when it was looked at last.

    Time in which nobody looked does not count: a job that is suspended as a whole has not stalled when it goes on.

    Attributes:
        seconds: Since the place was first seen.
    """

    def __init__(self) -> None:
        self._place: object = None
        self._looked = self.seconds = 0.0

    def look(self, place: object) -> float:
        """Note where it is now; returns `seconds`."""
        now = time.monotonic()
        if place == self._place:
            self.seconds += min(now - self._looked, _MAX_GAP_SECONDS)
        else:
            self._place, self.seconds = place, 0.0
        self._looked = now
        return self.seconds


@dataclass(eq=False, slots=True)
class _Worker:
    """A thread and what it is at; told by the source as a `source.Progress`."""

    thread: threading.Thread | None = None
    job: RowJob | None = None
    number: int = 0
    phase: int = IDLE
    offset: int = -1
    watch: Watch = field(default_factory=Watch)
    is_abandoned: bool = False

    def reading(self, offset: int) -> None:
        """See `source.Progress`."""
        self.phase, self.offset = READING, offset

    def decoding(self) -> None:
        """See `source.Progress`."""
        self.phase = DECODING


class ThreadDecoders:
    """Decoders in threads of this process.

    A thread cannot be stopped from outside: one whose decoding does not end is left behind, another takes its place, and its sample
    enters the ledger. State: the queue, and what each thread is at.

    Attributes:
        arena_bytes: See `Decoders`.
    """

    arena_bytes = 0

    def __init__(self, source: SampleSource, num_workers: int, patience: Patience) -> None:
        self._source, self._patience = source, patience
        self._changed = threading.Condition()
        self._queue: deque[RowJob] = deque()
        self._is_closed = False
        self._num_stuck = 0
        self._workers: list[_Worker] = []
        for _ in range(num_workers):
            self._start()

    def submit(self, samples: Sequence[PlannedSample]) -> RowJob:
        """See `Decoders`."""
        job = RowJob.of(samples)
        with self._changed:
            if self._is_closed:
                job.finish(closed())
            else:
                self._queue.append(job)
                self._changed.notify()
        return job

    def result(self, job: RowJob) -> list[TokenSequence | Skipped]:
        """See `Decoders`."""
        while not job.done.wait(self._patience.watch_seconds):
            self._look_after_threads()
        return outcomes_of(job)

    def release(self, job: RowJob) -> None:
        """See `Decoders`."""

    def close(self) -> None:
        """See `Decoders`."""
        with self._changed:
            self._is_closed = True
            unfinished = [*self._queue, *(worker.job for worker in self._workers if worker.job)]
            self._queue.clear()
            self._changed.notify_all()
        for job in unfinished:
            job.finish(closed())
        deadline = time.monotonic() + JOIN_SECONDS
        for worker in self._workers:
            if worker.thread is not None and not self._is_stuck(worker):
                worker.thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self) -> None:
        worker = _Worker()
        # A daemon, because the interpreter waits for all others before it exits.
        worker.thread = threading.Thread(target=self._serve, args=(worker,), name="decode", daemon=True)
        self._workers.append(worker)
        worker.thread.start()

    def _serve(self, worker: _Worker) -> None:
        warm(self._source.encoder.rules)
        while (job := self._next(worker)) is not None:
            error = None
            try:
                self._decode(worker, job)
            except BaseException as problem:
                error = problem
            with self._changed:
                if worker.is_abandoned:
                    return
                worker.job = None
                job.finish(error)

    def _next(self, worker: _Worker) -> RowJob | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            worker.job = None if self._is_closed else self._queue.popleft()
            return worker.job

    def _decode(self, worker: _Worker, job: RowJob) -> None:
        for number, sample in enumerate(job.samples):
            if job.outcomes[number] is not None:
                continue
            worker.number = number
            outcome = self._source.load(sample, worker)
            with self._changed:
                worker.phase = IDLE
                if worker.is_abandoned or self._is_closed:
                    return
                job.outcomes[number] = outcome

    def _is_stuck(self, worker: _Worker) -> bool:
        limits = {IDLE: float("inf"), READING: self._patience.read_seconds, DECODING: self._patience.decode_seconds}
        return worker.watch.seconds > limits[worker.phase]

    def _look_after_threads(self) -> None:
        """Leave threads behind that are stuck.

        Raises:
            DataError: Reading is stuck, or too many threads are.
        """
        with self._changed:
            for worker in list(self._workers):
                worker.watch.look((worker.job, worker.number, worker.phase, worker.offset))
                job = worker.job
                if job is None or not self._is_stuck(worker):
                    continue
                if worker.phase == READING:
                    raise stalled(self._source, job.samples[worker.number], worker.offset, self._patience)
                self._abandon(worker, job, job.samples[worker.number])

    def _abandon(self, worker: _Worker, job: RowJob, sample: PlannedSample) -> None:
        self._num_stuck += 1
        if self._num_stuck > MAX_STUCK_THREADS:
            raise DataError(
                f"{self._num_stuck} samples took more than {self._patience.decode_seconds:g} s to decode and each keeps a thread, "
                f'the last is {name_of(self._source, sample)}; exclude them, or set data.decoders="processes"'
            )
        worker.is_abandoned = True
        self._workers.remove(worker)
        job.outcomes[worker.number] = self._source.skipped(sample, too_slow(self._patience))
        self._queue.appendleft(job)
        self._start()
        self._changed.notify()


def warm(rules: MediaRules) -> None:
    """Import what decoding needs, so that the first sample is not charged for it."""
    if rules.audio is not None:
        log_mel(np.zeros(rules.audio.min_samples, dtype=np.float32), rules.audio)


def outcomes_of(job: RowJob) -> list[TokenSequence | Skipped]:
    """What came of a job that is done.

    Raises:
        BaseException: What it failed with.
    """
    if job.error is not None:
        raise job.error
    assert None not in job.outcomes, "a row is done when all its samples are"
    return [outcome for outcome in job.outcomes if outcome is not None]


def too_slow(patience: Patience) -> str:
    """The ledger's reason for a sample whose decoding was given up."""
    return f"decoding took more than {patience.decode_seconds:g} s"


def closed() -> DataError:
    """The error of whoever waits for decoders that were closed."""
    return DataError("the loader is closed; open another one from the last state")


def stalled(source: SampleSource, sample: PlannedSample, offset: int, patience: Patience) -> DataError:
    """The error of reading that does not end. Reads nothing itself: the index of the shard may be what is stuck."""
    tar, number = source.datasets[sample.dataset].locate(sample.index)
    where = "its index" if offset < 0 else f"sample {number} at byte {offset}"
    return UnreachableData(f"reading {where} of shard {tar} has stood still for more than {patience.read_seconds:g} s; check the storage")


def name_of(source: SampleSource, sample: PlannedSample) -> str:
    """A sample and its shard, for people."""
    tar, _ = source.datasets[sample.dataset].locate(sample.index)
    return f"{source.key(sample)} in {tar}"
