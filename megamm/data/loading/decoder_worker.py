"""A decoder process: reads, decodes and encodes rows that its parent names, and lays the arrays into shared memory.

It is started as a program of its own, so it has none of its parent's threads, sockets or device contexts. It ends when its parent does:
the kernel kills it, and its socket closes. Signals that ask a whole run to stop are the run's to handle, not its own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import mmap
import os
import pickle
import select
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from megamm.config import Augment
from megamm.config.schema import Reading
from megamm.core.errors import MegaMMError
from megamm.core.types import TokenSequence
from megamm.data.ledger import Skipped
from megamm.data.loading.arena import Region, RegionWriter, map_arrays
from megamm.data.loading.decoders import DECODING, IDLE, READING, warm
from megamm.data.loading.source import SampleSource
from megamm.data.planning.rows import PlannedSample
from megamm.data.samples.datasets import ShardSet
from megamm.data.samples.encode import SampleEncoder
from megamm.data.shards.reader import Reader
from megamm.data.shards.remote import open_reader

RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What asks a run to stop, or tells it something; a terminal and Slurm send them to all its processes."""

_PR_SET_PDEATHSIG = 1
_NICE = 5


@dataclass(frozen=True)
class WorkerSpec:
    """All that decoding needs; sent to a worker when it starts.

    Attributes:
        datasets: By name; without their lengths, which may be larger than memory.
        encoder: How samples become sequences.
        reading: How bytes are read.
        reader: In place of the one that `reading` describes.
        augment: Dataset name -> random changes of its samples.
        seed: Of these changes.
    """

    datasets: Mapping[str, ShardSet]
    encoder: SampleEncoder
    reading: Reading
    reader: Reader | None
    augment: Mapping[str, Augment]
    seed: int

    def open(self) -> SampleSource:
        """The source that it describes."""
        reader = self.reader or open_reader(self.reading)
        return SampleSource(self.datasets, self.encoder, reader, augment=self.augment, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Request:
    """A row, or what is left of one: `number` tells it from all others of this process; its arrays go into `region`."""

    number: int
    samples: Sequence[PlannedSample]
    region: Region


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request: an outcome for each sample, or an error that ends the run with the traceback where it is a bug."""

    outcomes: list[TokenSequence | Skipped]
    error: MegaMMError | None = None
    trace: str = ""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that a worker logged; its parent logs it."""

    logger: str
    level: int
    text: str


class Board:
    """What a worker is doing, in memory that its parent sees. It stays readable when the worker is stopped or dead.

    State: request, sample of it, phase, offset.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._fields = memoryview(memory).cast("q")

    def begin(self, request: int, sample: int) -> None:
        """A sample of a request is next."""
        # The request goes last: who looks in between must not take what is left of the one before for this one's.
        self._fields[2] = IDLE
        self._fields[1] = sample
        self._fields[0] = request

    def reading(self, offset: int) -> None:
        """See `source.Progress`."""
        self._fields[3] = offset
        self._fields[2] = READING

    def decoding(self) -> None:
        """See `source.Progress`."""
        self._fields[2] = DECODING

    def look(self) -> tuple[int, int, int, int]:
        """Request, sample, phase and offset."""
        request, sample, phase, offset = self._fields[:4].tolist()
        return request, sample, phase, offset


def main(parent: int, socket: int, spec: int, memory: int, board: int) -> None:
    """A worker's life: a reply to each request, until the socket closes.

    Args:
        parent: Process id of the parent.
        socket: Descriptor of the connection to it.
        spec: Descriptor of a pickled `WorkerSpec`.
        memory: Descriptor of the arena.
        board: Descriptor of the board's memory.
    """
    die_with_parent(parent)
    faulthandler.enable()
    os.nice(_NICE)  # the training step comes first where processors are short
    connection = Connection(socket)
    lock = threading.Lock()

    def send(message: object) -> None:
        # Threads of a reader may log while a reply is sent.
        with lock:
            connection.send(message)

    _forward_logs(send)
    arena, progress = mmap.mmap(memory, 0), Board(mmap.mmap(board, 0))
    # Made once: Connection.poll makes one each time, which takes as long as decoding a short text.
    hung_up = select.poll()
    hung_up.register(socket, select.POLLIN)
    source = pickle.loads(mmap.mmap(spec, 0)).open()
    warm(source.encoder.rules)
    try:
        while True:
            request = connection.recv()
            reply = _reply(source, request, progress, RegionWriter(arena, request.region), hung_up)
            progress.begin(request.number, len(request.samples))
            send(reply)
    except (_HungUp, EOFError, OSError):
        # Without a parent there is nothing to clean up and nobody to tell; threads of a reader may hang.
        os._exit(0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; leave signals of the run to the run."""
    for number in RUN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RUN_SIGNALS)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(0)


class _HungUp(Exception):
    """The parent has closed the socket."""


def _reply(source: SampleSource, request: Request, progress: Board, write: RegionWriter, hung_up: select.poll) -> Reply:
    outcomes = []
    try:
        for number, sample in enumerate(request.samples):
            if hung_up.poll(0):
                # Nothing is sent to a busy worker: its parent has closed the socket.
                raise _HungUp
            progress.begin(request.number, number)
            outcome = source.load(sample, progress)
            outcomes.append(map_arrays(outcome, write) if isinstance(outcome, TokenSequence) else outcome)
    except MegaMMError as error:
        return Reply([], error)
    except _HungUp:
        raise
    except Exception:
        return Reply([], trace=traceback.format_exc())
    return Reply(outcomes)


class _Forward(logging.Handler):
    def __init__(self, send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(LogLine(record.name, record.levelno, record.getMessage()))


def _forward_logs(send) -> None:
    logger = logging.getLogger("megamm")
    logger.addHandler(_Forward(send))
    logger.setLevel(logging.INFO)
    logger.propagate = False
