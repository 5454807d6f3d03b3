"""Saving behind training: a snapshot between two steps, everything slow in a thread, agreement at later step boundaries.

The thread does file work and nothing else. Collectives stay on the thread that trains, because two threads would issue them in
an order that differs from rank to rank, and ranks that wait in different collectives wait for ever. So a save is a chain of
jobs, each of them local, and ranks learn at step boundaries (`poll`) whether all have finished the present one:

    write    every rank      its shard, hashed, synced; rank 0 the data state and the ledger as well
    commit   rank 0          the manifest of all files, then the rename
    verify   every rank      files of other ranks, read back from the disk
    retire   rank 0          `latest` leads to it; checkpoints that it replaces go

The other way, marker files that rank 0 waits for, would need no step boundary. It would also put the health of a save on what
a network file system shows when, load it with every rank's polling, and need a timeout for ranks that died, of which the
collectives of training know at once. The price here is that a commit waits for the step under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch

from megamm.checkpoint import random_states
from megamm.checkpoint.base import Base
from megamm.checkpoint.commit import Attempt, Progress, commit, remove, sweep, write_files
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.io import LOCAL, Buffer, Io
from megamm.checkpoint.load import parameter_entries
from megamm.checkpoint.lock import LostRun
from megamm.checkpoint.manifest import (
    DATA_STATE,
    LEDGER,
    MANIFEST,
    FileFacts,
    Manifest,
    aside,
    check_file,
    model_digest,
    rank_file,
    software_versions,
)
from megamm.checkpoint.retain import point_latest, retire
from megamm.checkpoint.snapshot import Snapshot
from megamm.config.schema import Checkpointing
from megamm.core.errors import CheckpointError, MegaMMError
from megamm.core.files import canonical_json
from megamm.core.logging import get_logger
from megamm.engine import partitions
from megamm.engine.distributed import World, agree, gather_json
from megamm.engine.runtime import Engine

_log = get_logger("checkpoint")
_RETRY_SECONDS = 1.0
_SEEN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint came to exist and was read back from the disk.

    Attributes:
        step: Optimizer steps that it holds.
        folder: Where it is.
        num_bytes: Size of all its files.
        stall_seconds: How long training waited for it: until the save before had ended, and for the snapshot.
        commit_seconds: From the snapshot to the rename, waiting for a step boundary included.
    """

    step: int
    folder: Path
    num_bytes: int
    stall_seconds: float
    commit_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A save came to nothing; older checkpoints are as they were.

    Attributes:
        step: What was to be saved.
        reason: Of the first rank that failed.
        num_in_a_row: Failures since the last checkpoint that verified.
    """

    step: int
    reason: str
    num_in_a_row: int


Outcome: TypeAlias = "Committed | Failed"


@dataclass(slots=True)
class _Save:
    """A save under way: what was read between the two steps beside the snapshot, and how far it is.

    Attributes:
        written: All files of the committed folder, the manifest included.
    """

    attempt: Attempt
    manifest: Manifest
    small_files: dict[str, bytes]
    asked: float
    copied: float = 0.0
    commit_seconds: float = 0.0
    written: dict[str, FileFacts] = field(default_factory=dict)


class Saver:
    """Commits checkpoints of one engine. Every method is called by every rank, between two steps.

    State: a host buffer of this rank's share of the state (`snapshot_bytes`), a thread, at most one save under way, and the
    number of failures in a row. Nothing of it is needed for resuming.

    Args:
        folder: The run's `checkpoints` folder.
        engine: What is saved.
        world: The ranks.
        settings: Whether training waits, what is kept, how many failures end the run.
        hold: This job's hold of the run; it is asked before anything is committed or deleted.
        base: Weights that hold all frozen parameters, which are then not saved; None to save them.
        io: The file system.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        world: World,
        settings: Checkpointing,
        *,
        hold: Hold | None = None,
        base: Base | None = None,
        io: Io = LOCAL,
    ):
        self._folder = folder
        self._engine = engine
        self._world = world
        self._settings = settings
        self._hold = hold or Hold()
        self._base = base
        self._io = io
        self._snapshot = Snapshot(self._state(), world.device)
        self._slices = _slices_of_ranks(partitions.uneven_slices(engine))
        self._parameters = tuple(parameter_entries(engine, base))
        self._model_digest = model_digest(self._parameters)
        self._software = software_versions()
        self._tell_memory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._num_attempts = 0
        self._num_failed = 0
        self._save: _Save | None = None
        self._unsaved: _Save | None = None
        self._job: Future[Any] | None = None
        self._then: Callable[[_Save, list[Any]], None] | None = None
        self._outcomes: list[Outcome] = []
        if world.is_main:
            # What dead owners left behind. Nothing waits for it; the first save is written after it.
            self._thread.submit(sweep, Attempt(folder, 0, self._hold.fence, 0), io)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, exception: BaseException | None, trace: object) -> None:
        # An error that all ranks have in common leaves them able to agree; after any other one a collective would hang, and
        # what the thread still writes could not be committed.
        in_order = exception is None or getattr(exception, "on_all_ranks", False)
        try:
            if in_order:
                self._drain()
        finally:
            self._thread.shutdown(wait=in_order)
            self._snapshot.close()

    @property
    def snapshot_bytes(self) -> int:
        """Host memory that this rank holds for snapshots, from its start to its end."""
        return self._snapshot.num_bytes

    @property
    def is_pending(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._save is not None

    def save(self, progress: Progress) -> None:
        """Copy the state into host memory and begin to write it; waits for the save before, whose snapshot is the same memory.

        Raises:
            CheckpointError: Too many saves failed in a row, or the run belongs to somebody else by now.
        """
        asked = time.monotonic()
        self._drain()
        self._snapshot.take(self._state())
        # Turned into bytes now: what the caller goes on to change must not reach the disk.
        ledger = "".join(canonical_json(entry) + "\n" for entry in progress.ledger)
        small_files = {DATA_STATE: canonical_json(progress.data_state).encode(), LEDGER: ledger.encode()}
        manifest = Manifest(
            step=progress.step,
            world_size=self._world.size,
            files={},
            parameters=self._parameters,
            engine=partitions.counters(self._engine),
            fingerprints={**progress.fingerprints, "model": self._model_digest},
            software=self._software,
            fence=self._hold.fence,
            slices=self._slices,
            num_tokens=progress.num_tokens,
            base=self._base,
        )
        self._begin(_Save(self._next_attempt(progress.step), manifest, small_files if self._world.is_main else {}, asked))
        if not self._settings.asynchronous:
            self._drain()

    def poll(self) -> list[Outcome]:
        """What became of saves since the last call; one small all-reduce while a save is under way.

        Returns:
            The same outcomes on every rank, but for the seconds, which each rank takes for itself.

        Raises:
            CheckpointError: Too many saves failed in a row, or the run belongs to somebody else by now.
        """
        if self._job is not None and not agree(not self._job.done()):
            self._advance()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def finish(self) -> list[Outcome]:
        """Wait for the save under way, and try again to write the last one where it failed: no other comes after it.

        Raises:
            CheckpointError: It could not be written, or the run belongs to somebody else by now.
        """
        self._drain()
        while self._unsaved is not None:
            time.sleep(_RETRY_SECONDS * self._num_failed)
            again = self._unsaved
            again.attempt = self._next_attempt(again.manifest.step)
            self._begin(again)
            self._drain()
        return self.poll()

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from partitions.local_state(self._engine, rank=self._world.rank, with_frozen=self._base is None)
        yield from random_states.capture(self._world.device).items()

    def _tell_memory(self) -> None:
        """Before the first step: whoever plans a job asks for memory by it."""
        if self._world.is_main:
            sizes = [size / (1 << 30) for size in (psutil.Process().memory_info().rss, self.snapshot_bytes, psutil.virtual_memory().total)]
            _log.info("rank 0 holds %.2f GiB of host memory, %.2f GiB of them for snapshots; the node has %.1f GiB", *sizes)

    def _next_attempt(self, step: int) -> Attempt:
        self._num_attempts += 1
        return Attempt(self._folder, step, self._hold.fence, self._num_attempts)

    # --- the chain of jobs: what a thread does, and what follows once all ranks have done it ---

    def _begin(self, save: _Save) -> None:
        self._save, self._unsaved = save, None
        save.copied = time.monotonic()
        self._start(lambda: self._write(save), self._written)

    def _start(self, job: Callable[[], Any] | None, then: Callable[[_Save, list[Any]], None]) -> None:
        self._then = then
        self._job = self._thread.submit(job or (lambda: None))

    def _start_on_main(self, job: Callable[[], Any], then: Callable[[_Save, list[Any]], None]) -> None:
        self._start(job if self._world.is_main else None, then)

    def _drain(self) -> None:
        while self._job is not None:
            self._job.exception()
            self._advance()

    def _advance(self) -> None:
        """Go on to the next job. Every rank has finished the present one."""
        assert self._job is not None and self._save is not None and self._then is not None, "a job belongs to a save"
        job, save, then = self._job, self._save, self._then
        self._job = None
        error = job.exception()
        is_known = isinstance(error, OSError | CheckpointError)
        reports = gather_json([job.result()] if error is None else [None, type(error).__name__, str(error), is_known])
        problems = [(rank, *report[1:]) for rank, report in enumerate(reports) if len(report) > 1]
        if not problems:
            then(save, [report[0] for report in reports])
            return
        # A mistake in the program comes before a full disk.
        rank, name, message, is_known = min(problems, key=lambda problem: problem[-1])
        if not is_known or name == LostRun.__name__:
            self._save = None
            if error is not None and not isinstance(error, MegaMMError):
                raise error
            if name == LostRun.__name__:
                raise _on_all_ranks(LostRun(message))
            crash = _on_all_ranks(MegaMMError(f"rank {rank} failed with {name}: {message}"))
            crash.may_pass = True
            raise crash
        self._fail(save, f"rank {rank}: {message}")

    def _write(self, save: _Save) -> dict[str, Any]:
        if self._world.is_main:
            sweep(save.attempt, self._io)
        files: dict[str, list[Buffer]] = {rank_file(self._world.rank): self._snapshot.blocks()}
        files |= {name: [data] for name, data in save.small_files.items()}
        return {name: asdict(facts) for name, facts in write_files(save.attempt, files, self._io).items()}

    def _written(self, save: _Save, parts: list[dict[str, Any]]) -> None:
        save.manifest.files.update({name: FileFacts(**facts) for part in parts for name, facts in part.items()})
        self._start_on_main(lambda: self._commit(save), self._committed)

    def _commit(self, save: _Save) -> list[Any]:
        facts = commit(save.attempt, save.manifest, self._io, self._hold.check)
        return [time.monotonic() - save.copied, asdict(facts)]

    def _committed(self, save: _Save, reports: list[Any]) -> None:
        save.commit_seconds, facts = reports[0]
        # With the manifest itself: one that reads back damaged must not replace older checkpoints either.
        save.written = save.manifest.files | {MANIFEST: FileFacts(**facts)}
        self._start(lambda: self._verify(save), self._verified)

    def _verify(self, save: _Save) -> str | None:
        # The shard of the rank before: on a network file system it is not in this machine's memory.
        names = sorted(save.written)
        _wait_until_seen(save.attempt.final)
        try:
            for name in names[(self._world.rank + 1) % self._world.size :: self._world.size]:
                check_file(save.attempt.final, name, save.written[name], from_disk=True)
        except CheckpointError as error:
            return str(error)
        return None

    def _verified(self, save: _Save, problems: list[str | None]) -> None:
        problem = next((problem for problem in problems if problem is not None), None)
        if problem is not None:
            self._start_on_main(lambda: self._set_aside(save), lambda save, _: self._fail(save, f"it reads back damaged: {problem}"))
            return
        self._num_failed = 0
        self._start_on_main(lambda: self._retire(save), self._retired)

    def _set_aside(self, save: _Save) -> None:
        self._hold.check()
        self._io.rename(save.attempt.final, aside(save.attempt.final, "damaged"))

    def _retire(self, save: _Save) -> list[str]:
        try:
            self._hold.check()
        except OSError as error:
            # The checkpoint is committed and read back by now; older ones may stay.
            _log.warning("the run's lease cannot be renewed (%s): older checkpoints stay for now", error)
            return []
        point_latest(self._folder, save.attempt.final.name, self._io)
        return retire(self._folder, save.attempt.step, self._settings, self._io)

    def _retired(self, save: _Save, names: list[Any]) -> None:
        self._save = None
        num_bytes = sum(facts.num_bytes for facts in save.manifest.files.values())
        stall = (save.copied if self._settings.asynchronous else time.monotonic()) - save.asked
        outcome = Committed(save.attempt.step, save.attempt.final, num_bytes, stall, save.commit_seconds)
        self._outcomes.append(outcome)
        if self._world.is_main:
            replaced = f", which replaces {', '.join(names[0])}" if names[0] else ""
            speed = f"{num_bytes >> 20} MiB in {outcome.commit_seconds:.1f} s, training waited {stall:.2f} s"
            _log.info("committed %s (%s)%s", outcome.folder.name, speed, replaced)

    # --- what failed ---

    def _fail(self, save: _Save, reason: str) -> None:
        self._num_failed += 1
        self._outcomes.append(Failed(save.attempt.step, reason, self._num_failed))
        self._start_on_main(lambda: remove(save.attempt.temporary, self._io), lambda save, _: self._give_up(save, reason))

    def _give_up(self, save: _Save, reason: str) -> None:
        self._save, self._unsaved = None, save
        message = f"checkpoint {save.attempt.final} was not written ({reason}); the older ones are as they were"
        if self._num_failed >= self._settings.max_failures:
            self._unsaved = None
            raise _on_all_ranks(CheckpointError(f"{message}; {self._num_failed} failures in a row end the run (checkpoint.max_failures)"))
        if self._world.is_main:
            _log.warning("%s; failure %d in a row, training goes on", message, self._num_failed)


def _slices_of_ranks(own: dict[str, tuple[int, int]]) -> dict[str, list[list[int]]]:
    """What each rank holds of each parameter, where that is no arithmetic; a collective."""
    slices: dict[str, list[list[int]]] = {}
    for rank, of_rank in enumerate(gather_json(own)):
        for name, (start, stop) in of_rank.items():
            slices.setdefault(name, []).append([rank, start, stop])
    return slices


def _wait_until_seen(folder: Path) -> None:
    """A network file system may show rank 0's rename late; that is no damage.

    In the thread: training goes on meanwhile. Only what waits for this save anyway waits for it too, which is the next save, the end
    of the run, and every step boundary with a save where `checkpoint.asynchronous` is off. The checkpoint exists by then, so that a
    job that is killed here loses none.

    Source: nfs(5), `acdirmax`: a client may believe in its listing of a folder for 60 seconds.
    """
    end = time.monotonic() + _SEEN_SECONDS
    while not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.1)


def _on_all_ranks(error: MegaMMError) -> MegaMMError:
    error.on_all_ranks = True
    return error
