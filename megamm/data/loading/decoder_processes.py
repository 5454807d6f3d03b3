"""Decoders in processes of their own: a thread here looks after each, and after what it does to the run when it dies or hangs."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from megamm.core.errors import ConfigError, DataError
from megamm.core.logging import get_logger
from megamm.core.types import TokenSequence
from megamm.data.ledger import Skipped
from megamm.data.loading.arena import Arena, Region, SampleBytes, map_arrays
from megamm.data.loading.decoder_worker import RUN_SIGNALS, Board, LogLine, Reply, Request, WorkerSpec
from megamm.data.loading.decoders import (
    DECODING,
    JOIN_SECONDS,
    READING,
    Patience,
    RowJob,
    Watch,
    closed,
    name_of,
    outcomes_of,
    stalled,
    too_slow,
)
from megamm.data.loading.source import SampleSource
from megamm.data.planning.rows import PlannedSample

MAX_RESTARTS_IN_A_ROW = 8
"""Restarts without a finished row between them: then it is not the samples."""

_START_SECONDS = 300.0
_STOP_SECONDS = 1.0
_STOPPED_SECONDS = 2.0
_SOCKET_SECONDS = 60
_ARRAYS_A_SAMPLE = 8
_PROGRAM = "import sys; sys.path[:] = sys.argv[6:]; from megamm.data.loading.decoder_worker import main; main(*map(int, sys.argv[1:6]))"
# Set for the workers alone. Buffers of pictures and sounds are used again instead of going back to the system each time.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}

_log = get_logger("data")


class ProcessDecoders:
    """Decoders in processes.

    A process that dies, is stopped or does not end with a sample is killed and replaced, and the sample tried once more; the second time
    it enters the ledger. State: the queue, the arena's regions, and what each process is at.

    Attributes:
        arena_bytes: See `Decoders`.
    """

    def __init__(
        self, source: SampleSource, spec: WorkerSpec, num_workers: int, patience: Patience, *, arena_bytes: int, sizes: SampleBytes
    ) -> None:
        """Start the processes.

        Args:
            source: Looks samples up for messages.
            spec: What the processes decode with.
            num_workers: Processes.
            patience: How long things may take.
            arena_bytes: Bound on decoded rows that wait to be collated.
            sizes: Of decoded arrays.

        Raises:
            ConfigError: The reader cannot be sent to another process, or this system has no anonymous shared memory.
        """
        try:
            content = pickle.dumps(spec)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ConfigError(f'{spec.reader!r} cannot be sent to decoder processes ({error}); set data.decoders="threads"') from None
        self.source, self.patience, self.arena = source, patience, Arena(arena_bytes)
        self.spec = os.memfd_create("megamm-decoder-spec", os.MFD_CLOEXEC)
        with open(self.spec, "wb", closefd=False) as file:
            file.write(content)
        self.arena_bytes, self._sizes = self.arena.num_bytes, sizes
        self._changed = threading.Condition()
        self._queue: deque[RowJob] = deque()
        self._under_way: set[RowJob] = set()
        self._regions: dict[RowJob, Region] = {}
        self.is_closed = False
        self._keepers = [_Keeper(self, number) for number in range(num_workers)]
        for keeper in self._keepers:
            keeper.start()

    def submit(self, samples: Sequence[PlannedSample]) -> RowJob:
        """See `Decoders`."""
        job = RowJob.of(samples)
        with self._changed:
            if self.is_closed:
                job.finish(closed())
            elif not samples:
                job.finish()
            else:
                self._queue.append(job)
                self._changed.notify_all()
        return job

    def result(self, job: RowJob) -> list[TokenSequence | Skipped]:
        """See `Decoders`."""
        with self._changed:
            job.is_awaited = True
            self._changed.notify_all()
        job.done.wait()
        return outcomes_of(job)

    def release(self, job: RowJob) -> None:
        """See `Decoders`."""
        job.outcomes.clear()
        with self._changed:
            if (region := self._regions.pop(job, None)) is not None:
                self.arena.release(region)
                self._changed.notify_all()

    def close(self) -> None:
        """See `Decoders`."""
        with self._changed:
            self.is_closed = True
            unfinished = [*self._queue, *self._under_way]
            self._queue.clear()
            self._changed.notify_all()
        for job in unfinished:
            job.finish(closed())
        for keeper in self._keepers:
            keeper.hang_up()
        for keeper in self._keepers:
            keeper.join(JOIN_SECONDS)
        self.arena.close()
        if self.spec >= 0:
            os.close(self.spec)
            self.spec = -1

    def next_job(self) -> tuple[RowJob, Region] | None:
        """The oldest job, as soon as there is room for it; None when the decoders were closed.

        Room is given in the order of the queue, so that what is needed first never waits for what is needed later. A row that is
        waited for while the rows before it, of the same micro-batch, fill the arena must do without.
        """
        found: tuple[RowJob, Region] | None = None

        def take() -> bool:
            nonlocal found
            if self._queue and not self.is_closed:
                samples = self._queue[0].samples
                size = self._sizes.row(samples)
                region = self.arena.reserve(self.arena.room_for(size, _ARRAYS_A_SAMPLE * len(samples)))
                if region is None and self._queue[0].is_awaited:
                    region = self.arena.reserve(0)
                if region is not None:
                    found = self._queue.popleft(), region
            return self.is_closed or found is not None

        with self._changed:
            self._changed.wait_for(take)
            if found is not None:
                job, region = found
                self._regions[job] = region
                self._under_way.add(job)
            return found

    def finished(self, job: RowJob, error: BaseException | None) -> None:
        """A job is over."""
        with self._changed:
            self._under_way.discard(job)
        job.finish(error)


class _Lost(Exception):
    """A worker that had to be given up: why, and the sample of the request that is to blame for it, if one is."""

    def __init__(self, reason: str, sample: int | None) -> None:
        super().__init__(reason)
        self.reason, self.sample = reason, sample


class _Keeper(threading.Thread):
    """Feeds one worker, watches it and replaces it. State: the worker, and the restarts since its last finished row."""

    def __init__(self, decoders: ProcessDecoders, number: int) -> None:
        super().__init__(name=f"decoder-{number}", daemon=True)
        self._decoders = decoders
        self._worker: _Worker | None = None
        self._lock = threading.Lock()
        self._restarts: list[str] = []

    def run(self) -> None:
        # A worker inherits the mask, and with it deafness to the run's signals from its first instruction on.
        signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
        try:
            # Ahead of the first row. What fails here fails again when there is one, and is heard of then.
            with contextlib.suppress(OSError, DataError):
                self._ensure_worker()
            while (taken := self._decoders.next_job()) is not None:
                job, region = taken
                error = None
                try:
                    self._decode(job, region)
                except BaseException as problem:
                    error = problem
                self._decoders.finished(job, error)
        finally:
            self._drop_worker()

    def hang_up(self) -> None:
        """Close the worker's socket from another thread: an idle worker leaves, and whoever waits for it here hears of it."""
        with self._lock:
            if self._worker is not None:
                self._worker.hang_up()

    def _decode(self, job: RowJob, region: Region) -> None:
        failures: dict[int, str] = {}
        while left := [number for number, outcome in enumerate(job.outcomes) if outcome is None]:
            try:
                outcomes = self._ensure_worker().ask([job.samples[number] for number in left], region)
            except _Lost as lost:
                self._drop_worker()
                self._blame(job, left[lost.sample] if lost.sample is not None else None, lost.reason, failures)
                continue
            self._restarts.clear()
            for number, outcome in zip(left, outcomes, strict=True):
                job.outcomes[number] = map_arrays(outcome, self._decoders.arena.view) if isinstance(outcome, TokenSequence) else outcome

    def _blame(self, job: RowJob, number: int | None, reason: str, failures: dict[int, str]) -> None:
        """Note why a worker was lost; a sample that was to blame before is skipped."""
        if self._decoders.is_closed:
            raise closed()
        source = self._decoders.source
        name = "its work" if number is None else name_of(source, job.samples[number])
        self._restarts.append(name)
        _log.warning("decoder process given up at %s: %s", name, reason)
        if len(self._restarts) > MAX_RESTARTS_IN_A_ROW:
            raise DataError(
                f"decoder processes were lost {len(self._restarts)} times in a row, the last time because {reason}; "
                f"they were at {', '.join(dict.fromkeys(self._restarts[-3:]))}; look at memory and at standard error"
            )
        if number is not None and number in failures:
            both = f"{reason} twice" if failures[number] == reason else f"{failures[number]}, then {reason}"
            job.outcomes[number] = source.skipped(job.samples[number], both)
        elif number is not None:
            failures[number] = reason

    def _ensure_worker(self) -> _Worker:
        if self._worker is None:
            worker = _Worker(self._decoders)
            with self._lock:
                self._worker = worker
            if self._decoders.is_closed:
                raise closed()
        return self._worker

    def _drop_worker(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()


class _Worker:
    """One process, its socket and its board. State: the request that it is at."""

    def __init__(self, decoders: ProcessDecoders) -> None:
        self._decoders, self._request, self._watch = decoders, 0, Watch()
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            # A process that is stopped in the middle of a message must not stop this one.
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _SOCKET_SECONDS, 0))
        board = os.memfd_create("megamm-board", os.MFD_CLOEXEC)
        try:
            os.ftruncate(board, mmap.PAGESIZE)
            self._board = Board(mmap.mmap(board, mmap.PAGESIZE))
            passed = [theirs.fileno(), decoders.spec, decoders.arena.descriptor, board]
            command = [sys.executable, "-c", _PROGRAM, *map(str, [os.getpid(), *passed]), *sys.path]
            self._process = subprocess.Popen(
                command,
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(board)
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))

    def ask(self, samples: Sequence[PlannedSample], region: Region) -> list[TokenSequence | Skipped]:
        """Have samples decoded.

        Raises:
            _Lost: The process died, was stopped, or does not end with a sample.
            DataError: A shard cannot be read, or reading does not end.
            RuntimeError: A bug, with its traceback.
        """
        self._request += 1
        try:
            self._connection.send(Request(self._request, samples, region))
            while True:
                while not self._connection.poll(self._decoders.patience.watch_seconds):
                    self._look(samples)
                message = self._connection.recv()
                if isinstance(message, Reply):
                    break
                assert isinstance(message, LogLine), "a worker sends replies and log lines"
                logging.getLogger(message.logger).log(message.level, "decoder process: %s", message.text)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._death() from None
        if message.error is not None:
            raise message.error
        if message.trace:
            raise RuntimeError(f"a decoder process failed at {[sample.index for sample in samples]}:\n{message.trace}")
        return message.outcomes

    def hang_up(self) -> None:
        """Close the connection for both sides."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """End the process; one that does not leave by itself at once is killed."""
        self.hang_up()
        try:
            self._process.wait(0 if not self._decoders.is_closed else _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # A process inside a read of storage that hangs dies when the read returns.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self._connection.close()
        self._socket.close()

    def _look(self, samples: Sequence[PlannedSample]) -> None:
        """Raise where the process has been at one thing for too long."""
        patience = self._decoders.patience
        request, sample, phase, offset = place = self._board.look()
        seconds = self._watch.look((self._request, *place))
        if seconds > min(_STOPPED_SECONDS, patience.decode_seconds) and _is_stopped(self._process.pid):
            raise _Lost("its decoder was stopped", None)
        if request != self._request:
            if seconds > (max(patience.decode_seconds, _START_SECONDS) if request == 0 else patience.decode_seconds):
                raise _Lost("it did not begin", None)
        elif sample == len(samples):
            if seconds > patience.decode_seconds:
                raise _Lost("it did not send its reply", None)
        elif phase == READING and seconds > patience.read_seconds:
            raise stalled(self._decoders.source, samples[sample], offset, patience)
        elif phase == DECODING and seconds > patience.decode_seconds:
            raise _Lost(too_slow(patience), sample)

    def _death(self) -> _Lost:
        request, sample, phase, _ = self._board.look()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._decoders.is_closed else _STOP_SECONDS)
        code = self._process.returncode
        if code is None:
            return _Lost("its decoder stopped answering", None)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        # What dies while it reads dies of the storage or by somebody's hand, not of a sample that it has not seen yet.
        to_blame = request == self._request and phase == DECODING
        return _Lost(f"its decoder died ({how})", sample if to_blame else None)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False
