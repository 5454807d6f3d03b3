"""Worker processes that write shards, one each at a time.

What a shard holds does not depend on who writes it. A worker that dies is noticed and named with its shard; workers whose parent died
notice it at the next record and leave nothing half written.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megamm.core.errors import DataError, MegaMMError
from megamm.prepare.shard import Finished, Make, Task, do_shard

_REPORT_SECONDS = 0.2
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a worker could not do: an error for people, or the traceback of a bug."""

    error: MegaMMError | None
    trace: str


def run_tasks(tasks: Iterable[Task], make: Make, *, num_workers: int, advance: Callable[[int], None]) -> Generator[Finished]:
    """Do all tasks; results come as they are finished.

    Args:
        tasks: Taken one by one, so that a long plan takes no memory.
        make: Of the listing; must be picklable for more than one worker.
        num_workers: Processes; 1 does everything in this one.
        advance: Told how many more records are done.

    Raises:
        DataError: A shard cannot be done, or a worker died. The other workers are stopped; what they have not finished leaves no file.
    """
    if num_workers == 1:
        yield from (do_shard(task, make, advance) for task in tasks)
        return
    # Workers are forked from a clean server process, which imports the slow libraries once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megamm.prepare.shard", "webdataset"])
    workers: list[_Worker] = []
    try:
        workers += [_Worker(context, make) for _ in range(num_workers)]
        yield from _dispatch(iter(tasks), workers, advance)
    finally:
        for worker in workers:
            worker.stop()


def _dispatch(tasks: Iterator[Task], workers: list[_Worker], advance: Callable[[int], None]) -> Iterator[Finished]:
    busy = {worker.connection: worker for worker in workers if worker.give(next(tasks, None))}
    while busy:
        for connection in wait(list(busy)):
            worker = busy[connection]
            message = worker.receive()
            if isinstance(message, int):
                advance(message)
                continue
            if not worker.give(next(tasks, None)):
                del busy[connection]
            yield message


class _Worker:
    """A process with a pipe to it. Its state is the task that it is doing."""

    def __init__(self, context: Any, make: Make) -> None:
        self.connection, theirs = context.Pipe()
        self._task: Task | None = None
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, task: Task | None) -> bool:
        """Hand over a task; False where there is none."""
        self._task = task
        if task is not None:
            try:
                self.connection.send(task)
            except BrokenPipeError:
                raise self._death() from None
        return task is not None

    def receive(self) -> int | Finished:
        """The next message: records done, or the finished shard."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if not isinstance(message, _Failure):
            return message
        if message.error is not None:
            raise message.error
        raise RuntimeError(f"a worker failed at shard {self._task and self._task.path}:\n{message.trace}")

    def stop(self) -> None:
        """End the process; SIGTERM lets it remove what it has half written."""
        self.connection.close()
        self._process.terminate()
        self._process.join(_STOP_SECONDS)
        self._process.kill()
        self._process.join()

    def _death(self) -> DataError:
        self._process.join(_STOP_SECONDS)
        what = f"shard {self._task.path}" if self._task else "its work"
        return DataError(
            f"the process that wrote {what} ended by itself (exit code {self._process.exitcode}; -9 often means that memory ran out); "
            "use fewer --workers and run the same command again, finished shards are kept"
        )


def _serve(connection: Connection, make: Make) -> None:
    """A worker's life: tasks in, progress and results out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c reaches the whole group; the parent stops its workers itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    progress = Progress(connection.send)
    try:
        while True:
            task = connection.recv()
            try:
                message = do_shard(task, make, progress)
            except MegaMMError as error:
                message = _Failure(error, "")
            except Exception:
                message = _Failure(None, traceback.format_exc())
            progress.flush()
            connection.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class Progress:
    """Sums up counts and hands them on a few times a second.

    State: the count that was not handed on yet. With a pipe whose reader died it raises, which ends the work.
    """

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send
        self._count = 0
        self._sent = time.monotonic()

    def __call__(self, count: int) -> None:
        """Add to the count."""
        self._count += count
        if time.monotonic() - self._sent >= _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand the count on."""
        count, self._count, self._sent = self._count, 0, time.monotonic()
        if count:
            self._send(count)
