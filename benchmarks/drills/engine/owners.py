"""Two jobs on one run folder: the second is refused by the first one's name, and the first never notices."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.engine.attempts import outcome
from benchmarks.drills.engine.equality import Unbroken, last_commit, left_in, numbers
from benchmarks.drills.engine.ground import Ground
from benchmarks.drills.engine.jobs import ForkedJob

_STEPS = 100_000
_RECIPE = (f"--train.steps={_STEPS}", "--checkpoint.every=5")
_SECONDS: dict[Size, tuple[int, ...]] = {"quick": (2,), "normal": (1, 2, 3, 2, 1), "full": (1, 2, 3) * 10}
"""Numbers of ranks of the jobs that come second, one after the other."""
_JOB = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "drill"}


def two_jobs(size: Size, folder: Path) -> Tally:
    """Against a job with a scheduler's id and, in the longer forms, against one without."""
    firsts = {"job 4711 (restart 2)": _JOB} | ({} if size == "quick" else {"a process without a scheduler": {}})
    problems: list[str] = []
    with Ground(folder, *_RECIPE) as ground:
        for number, (called, environment) in enumerate(firsts.items()):
            run = f"contested-{number}"
            with ground.fork(run, environment=environment) as first:
                first.until(lambda run=run: len(numbers(ground.path(run))) > 1, "the first job did not train")
                attempts = [functools.partial(_intrude, ground, run, called, first, num_ranks) for num_ranks in _SECONDS[size]]
                problems += [outcome(attempt) for attempt in attempts]
                problems.append(outcome(first.stop))
            problems[-1] = problems[-1] or outcome(functools.partial(_compare, ground, run))
    return Tally.of(problems, f"second jobs on 1 to 3 ranks; {len(firsts)} tries are the first jobs, bit-equal at their end")


def _intrude(ground: Ground, run: str, called: str, first: ForkedJob, num_ranks: int) -> list[str]:
    trained = len(numbers(ground.path(run)))
    with ground.fork(run, num_ranks=num_ranks) as second:
        second.until(lambda: first.is_over, "the second job was not refused")
        if first.is_over:
            return [f"the first job ended: {first.last_words()}"]
        statuses, words = second.wait(), second.last_words()
    expected = f"is in use by {called} on {platform.node()}, pid {first.ranks()[0]}"
    problems = [f"the second job ended with {statuses}: {words}"] * (0 in statuses)
    problems += [f"the second job was not told {expected!r} but {words!r}"] * (expected not in words)
    first.until(lambda: len(numbers(ground.path(run))) > trained, "the first job stands still")
    return problems + [f"the first job ended: {first.last_words()}"] * first.is_over


def _compare(ground: Ground, run: str) -> list[str]:
    last_step = last_commit(ground.path(run))
    ground.train(f"{run}-unbroken", "--checkpoint.every=1", "--checkpoint.keep_last=1000000", f"--stop-after={last_step}")
    unbroken = Unbroken.of(ground.path(f"{run}-unbroken"))
    problems = unbroken.problems(ground.path(run), last_step=last_step)
    return problems + [f"{name} was left" for name in left_in(ground.path(run) / "checkpoints")]


DRILLS = (Drill("with the engine: a second job on a run that trains", two_jobs, needs_engine=True),)
