"""One run that is preempted again and again through its launcher, and goes on each time."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.engine.attempts import outcome
from benchmarks.drills.engine.equality import Unbroken, last_commit, left_in, numbers
from benchmarks.drills.engine.ground import Ground, end_in_order
from benchmarks.drills.engine.jobs import LaunchedJob, send

_TRIES: dict[Size, int] = {"quick": 2, "normal": 25, "full": 80}
# A preemption lets a few steps pass, or a dozen where it waits for a commit; the run must outlast them all.
_STEPS_A_TRY = 12
_RUN = "preempted"
_KILL = (signal.SIGKILL,)
_WAYS = ((signal.SIGTERM,), _KILL, (signal.SIGUSR1,), (signal.SIGTERM, signal.SIGUSR1))
"""Signals that follow each other: the second one comes while the ranks stop for the first."""


def preemptions(size: Size, folder: Path) -> Tally:
    """Preempt, then let the run come to its end, which must be that of a run nobody ever disturbed."""
    num_tries = _TRIES[size]
    num_steps = 12 + num_tries * _STEPS_A_TRY
    draw = random.Random(25)
    with Ground(folder, f"--train.steps={num_steps}", "--checkpoint.every=3") as ground:
        ways = [_WAYS[number % len(_WAYS)] for number in range(num_tries)]
        problems = [outcome(lambda way=way: _preempt(ground, way, draw)) for way in ways]
        num_done = last_commit(ground.path(_RUN))
        problems.append(outcome(lambda: _compare(ground, num_steps)))
    note = f"in a row, {sum(way is _KILL for way in ways)} by SIGKILL of the process group; {num_done} of {num_steps} steps came of them"
    return Tally.of(problems, note + "; the last try lets it end, bit-equal")


def _preempt(ground: Ground, way: tuple[signal.Signals, ...], draw: random.Random) -> list[str]:
    run = ground.path(_RUN)
    before = last_commit(run)
    with ground.launch(_RUN) as job:
        job.until(lambda: all(map(job.is_listening, (signal.SIGTERM, signal.SIGUSR1))), "no rank listens to signals")
        if way is _KILL:
            job.until(lambda: last_commit(run) > before, "nothing was committed")
            time.sleep(draw.uniform(0, 0.5))
            os.killpg(job.launcher, signal.SIGKILL)
        else:
            _wait_for_some_moment(job, run, draw)
            for number in way:
                send(job.launcher, number)
                time.sleep(draw.uniform(0, 0.5))
        (status,) = job.wait()
        job.leave_nothing()
        words = job.last_words()
    found = [] if last_commit(run) > before else [f"{way}: no progress beyond step {before}: {words}"]
    if way is _KILL:
        return found + [f"the launcher ended with {status}"] * (status != -signal.SIGKILL)
    if status or not (run / "INTERRUPTED").is_file():
        return [*found, f"{way}: the launcher ended with {status}, INTERRUPTED {(run / 'INTERRUPTED').is_file()}: {words}"]
    told = json.loads((run / "INTERRUPTED").read_text())
    if told["step"] != last_commit(run) or told["reason"] not in {one.name for one in way}:
        found.append(f"{way}: INTERRUPTED says {told}, the newest checkpoint is of step {last_commit(run)}")
    return found


def _wait_for_some_moment(job: LaunchedJob, run: Path, draw: random.Random) -> None:
    """While it starts, or after some of its steps."""
    if draw.random() < 0.4:
        time.sleep(draw.uniform(0, 2))
        return
    seen = len(numbers(run))
    num_steps = draw.randint(1, 4)
    job.until(lambda: _num_new(run, seen) >= num_steps, "no step was trained")
    time.sleep(draw.uniform(0, 0.2))


def _num_new(run: Path, seen: int) -> int:
    """Steps beyond those that were told before; a resumed run cuts its lines back first, which counts as none."""
    return max(0, len(numbers(run)) - seen)


def _compare(ground: Ground, num_steps: int) -> list[str]:
    with ground.launch(_RUN) as job:
        end_in_order(job)
    run = ground.path(_RUN)
    problems = Unbroken.train(ground).problems(run, last_step=num_steps)
    if not (run / "DONE").is_file() or (run / "INTERRUPTED").exists():
        problems.append("the markers do not say that it is done")
    return problems + [f"{name} was left" for name in left_in(run / "checkpoints")]


DRILLS = (Drill("with the engine: preemptions in a row, through the launcher", preemptions, needs_engine=True),)
