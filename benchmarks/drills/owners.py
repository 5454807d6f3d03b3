"""Two jobs and more on one run folder: real processes that are refused, killed, stopped, and wake up too late."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.ranks import fork, run_ranks, wait_for
from benchmarks.drills.saving import problem_with, save_alone, state_at
from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.fence import Fence
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.io import LOCAL, Io
from megamm.checkpoint.lock import LostRun, RunLock
from megamm.checkpoint.manifest import read_manifest
from megamm.core.errors import CheckpointError
from megamm.engine.distributed import World, barrier
from tests.support.faults import WatchedIo

SHORT_SECONDS, LONG_SECONDS = 0.5, 600.0
NUM_CONTENDERS = 5
_PATIENCE_SECONDS = 60.0
_COUNTS: dict[Size, int] = {"quick": 2, "normal": 40, "full": 400}


@dataclass(frozen=True, slots=True)
class Job:
    """A job in a process of its own: answers a line to every line."""

    process: int
    line: Connection

    def tell(self, order: str) -> None:
        """Send a line."""
        self.line.send_bytes(order.encode())

    def hear(self) -> str:
        """Its next line."""
        try:
            return self.line.recv_bytes().decode() if self.line.poll(_PATIENCE_SECONDS) else "silent"
        except EOFError:
            return "dead"

    def ask(self, order: str) -> str:
        """Send a line and hear the next one."""
        self.tell(order)
        return self.hear()


@contextmanager
def job(run: Path, number: int, *, lease_seconds: float, io: Io = LOCAL) -> Iterator[Job]:
    """Start a job that tries to own a run at once; it is gone at the end, whatever it does."""
    ours, theirs = Pipe()
    process = fork(lambda: _be_job(run, number, theirs, lease_seconds, io))
    theirs.close()
    try:
        yield Job(process, ours)
    finally:
        os.kill(process, signal.SIGKILL)
        wait_for([process], _PATIENCE_SECONDS)
        ours.close()


def _be_job(run: Path, number: int, line: Connection, lease_seconds: float, io: Io) -> None:
    # Without a scheduler's programs: what they say has drills of its own, on a real cluster.
    os.environ.update(SLURM_JOB_ID=str(number), SLURM_RESTART_COUNT="0", PATH="")

    def say(words: str) -> None:
        line.send_bytes(words.encode())

    try:
        lock = RunLock.acquire(run, lease_seconds=lease_seconds)
    except CheckpointError as error:
        say(f"refused: {error}")
        return
    hold = Hold(Fence(lock.number, str(number)), lock)
    say(f"owner {lock.number}")
    while order := line.recv_bytes().decode():
        word, _, step = order.partition(" ")
        try:
            if word == "start":
                lock.started_at(int(step))
            elif word == "save":
                save_alone(run, state_at(int(step), run=number), 2, hold=hold, io=io)
            elif word == "leave":
                lock.release()
            lock.check()
            say("done")
        except LostRun as error:
            say(f"lost: {error}")
        except OSError as error:
            say(f"failed: {error}")


def second_job(size: Size, folder: Path) -> Tally:
    """A second job starts while the first one works."""

    def trial(run: Path, number: int) -> str:
        with job(run, 1000 + number, lease_seconds=SHORT_SECONDS) as first, job(run, 2000 + number, lease_seconds=SHORT_SECONDS) as second:
            # Either may be faster; the other is told by whom it was beaten.
            answers = {1000 + number: first.hear(), 2000 + number: second.hear()}
            winners = [one for one, answer in answers.items() if answer.startswith("owner")]
            if len(winners) != 1:
                return f"owners: {answers}"
            (loser,) = answers.keys() - winners
            if f"refused: {run} is in use by job {winners[0]} " not in answers[loser]:
                return f"not told by whom: {answers[loser]}"
            return _expect({1000 + number: first, 2000 + number: second}[winners[0]].ask("save 10"), "done")

    return _tries(trial, size, folder, "refused with the first one's job")


def killed_owner(size: Size, folder: Path) -> Tally:
    """The owner is killed on the same machine: nobody waits for its lease."""

    def trial(run: Path, number: int) -> str:
        with job(run, 1, lease_seconds=LONG_SECONDS) as first:
            problem = _expect(first.hear(), "owner 1") or _expect(first.ask("start 0"), "done") or _expect(first.ask("save 10"), "done")
        started = time.monotonic()
        with job(run, 2, lease_seconds=LONG_SECONDS) as second:
            problem = problem or _expect(second.hear(), "owner 2") or _expect(second.ask("start 10"), "done")
            if time.monotonic() - started > LONG_SECONDS / 10:
                problem = problem or "it waited"
            return problem or _expect(second.ask("save 20"), "done") or _newest(run, 20, 2)

    return _tries(trial, size, folder, f"taken over at once, lease {LONG_SECONDS:g} s")


def stopped_owner(size: Size, folder: Path) -> Tally:
    """The owner hangs until its lease has run out, and goes on later as if nothing had been."""

    def trial(run: Path, number: int) -> str:
        with job(run, 1, lease_seconds=SHORT_SECONDS) as first, job_after(run, first) as second:
            problem = _expect(second.hear(), "owner 2") or _expect(second.ask("start 10"), "done") or _expect(second.ask("save 20"), "done")
            os.kill(first.process, signal.SIGCONT)
            problem = problem or _expect(first.ask("save 20"), "lost: ") or _expect(first.ask("save 30"), "lost: ")
            return problem or _expect(second.ask("save 30"), "done") or _newest(run, 30, 2)

    return _tries(trial, size, folder, f"lease {SHORT_SECONDS:g} s; the old owner's saves are refused")


@contextmanager
def job_after(run: Path, first: Job) -> Iterator[Job]:
    """A job that follows one which saved step 10 and was stopped."""
    for order in ("", "start 0", "save 10"):
        answer = first.ask(order) if order else first.hear()
        assert answer in ("owner 1", "done"), answer
    os.kill(first.process, signal.SIGSTOP)
    with job(run, 2, lease_seconds=SHORT_SECONDS) as second:
        yield second


def sleeping_owner(size: Size, folder: Path) -> Tally:
    """The owner passes its last check, sleeps while another takes over and saves, and then does its rename."""

    def trial(run: Path, number: int) -> str:
        with job(run, 1, lease_seconds=SHORT_SECONDS, io=_asleep_at_rename("step_00000020")) as first:
            problem = _expect(first.hear(), "owner 1") or _expect(first.ask("start 0"), "done") or _expect(first.ask("save 10"), "done")
            first.tell("save 20")
            os.waitpid(first.process, os.WUNTRACED)
            with job(run, 2, lease_seconds=SHORT_SECONDS) as second:
                problem = problem or _expect(second.hear(), "owner 2") or _expect(second.ask("start 10"), "done")
                # The same step, an earlier one, or none yet.
                step = random.Random(number).choice([20, 15, 10])
                problem = problem or (_expect(second.ask(f"save {step}"), "done") if step > 10 else "")
                os.kill(first.process, signal.SIGCONT)
                problem = problem or _expect(first.hear(), "(lost|failed): ")
                return problem or _newest(run, step, 2 if step > 10 else 1) or _expect(second.ask("save 30"), "done") or _newest(run, 30, 2)

    return _tries(trial, size, folder, "what it commits is passed over by its fence")


def contenders(size: Size, folder: Path) -> Tally:
    """Many jobs at once on the run of one that died."""

    def trial(run: Path, number: int) -> str:
        with job(run, 1, lease_seconds=LONG_SECONDS) as first:
            problem = _expect(first.hear(), "owner 1") or _expect(first.ask("start 0"), "done")
        answers = run_ranks(lambda world: _contend(run, world), NUM_CONTENDERS)
        owners = [one.result for one in answers if one.result]
        return problem or ("" if owners == [2] else f"owners {owners}, {[one.error for one in answers if one.error]}")

    return _tries(trial, size, folder, f"{NUM_CONTENDERS} processes")


def _contend(run: Path, world: World) -> int:
    # Ranks only to begin together and to end together: each of them is a job.
    barrier()
    try:
        number = RunLock.acquire(run, lease_seconds=LONG_SECONDS / 100).number
    except CheckpointError:
        number = 0
    barrier()
    return number


def _asleep_at_rename(name: str) -> Io:
    def stop(number: int, operation: str, path: Path) -> None:
        if operation == "rename" and name in path.name:
            os.kill(os.getpid(), signal.SIGSTOP)

    return WatchedIo(stop)


def _newest(run: Path, step: int, by: int) -> str:
    """What is wrong where step `step` of job `by` should be chosen."""

    def choose(world: World) -> str:
        choice = newest_good(run / "checkpoints", world)
        if choice.folder is None or read_manifest(choice.folder).step != step:
            return f"{choice.folder} was chosen, not step {step}: {choice.damaged}"
        return problem_with(choice.folder, state_at(step, run=by))

    (ended,) = run_ranks(choose, 1)
    return ended.error or ended.result


def _expect(answer: str, words: str) -> str:
    return "" if re.match(words, answer) else f"{answer!r} instead of {words!r}"


def _tries(trial: Callable[[Path, int], str], size: Size, folder: Path, note: str) -> Tally:
    return Tally.of([trial(folder / f"run-{number}", number) for number in range(_COUNTS[size])], note)


DRILLS = (
    Drill("two jobs that start on one run", second_job),
    Drill("an owner that is killed", killed_owner),
    Drill("an owner that hangs beyond its lease", stopped_owner),
    Drill("an owner that sleeps between its last check and its rename", sleeping_owner),
    Drill("many jobs at once on a dead one's run", contenders),
)
