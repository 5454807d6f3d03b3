"""A disk that fills up under `megamm pretrain` and is freed later: a small file system of its own holds the run folder.

What fills it takes the rest of a checkpoint at a random byte, or everything while one is being written: then no line of a log, no
sign of life and no lease finds room either.
"""

from __future__ import annotations

import errno
import functools
import os
import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.engine.attempts import outcome
from benchmarks.drills.engine.equality import Unbroken, last_commit, left_in
from benchmarks.drills.engine.ground import Ground, end_in_order
from benchmarks.drills.engine.jobs import ForkedJob
from benchmarks.drills.mounts import free_bytes, small_disk, tally_inside
from megamm.checkpoint.manifest import committed, verify
from megamm.core.json_lines import read_json_lines

_TRIES: dict[Size, int] = {"quick": 2, "normal": 20, "full": 80}
_DISK_BYTES = 32 << 20
_STEPS, _EVERY = 36, 4
_RECIPE = (f"--train.steps={_STEPS}", f"--checkpoint.every={_EVERY}", "--checkpoint.keep_last=1", "--checkpoint.max_failures=1000")
_SLOW = {"name": "slow", "seconds": 0.1}
"""So that a save takes long enough to be met under way."""
_WARNING, _REASON = "training goes on", os.strerror(errno.ENOSPC)


def fill_and_free(size: Size, folder: Path) -> Tally:
    """The disk stays full until two or three saves have failed; the run must not notice more of it than that."""
    return tally_inside(__name__, size, folder)


def inside(folder: Path, size: Size) -> tuple[list[str], str]:
    """In a namespace where mounts are allowed: the problem of each try, and a note."""
    draw = random.Random(28)
    num_failed: list[int] = []
    with Ground(folder, *_RECIPE) as ground:
        unbroken = Unbroken.train(ground)
        num_bytes = sum(path.stat().st_size for path in committed(unbroken.run / "checkpoints")[-1][1].iterdir())
        problems = []
        for number in range(_TRIES[size]):
            # By turns at a random byte of a save that begins, and all that is left in the middle of one.
            num_free = 0 if number % 2 else draw.randrange(num_bytes)
            attempt = functools.partial(_try, ground, unbroken, f"full-{number}", num_free, draw.randint(2, 3), num_failed)
            problems.append(outcome(attempt))
    note = f"on a tmpfs of {_DISK_BYTES >> 20} MiB that filled up as checkpoints of {num_bytes >> 10} KiB were written"
    return problems, f"{note}; {sum(num_failed)} saves failed, then one went through; bit-equal at the end"


def _try(ground: Ground, unbroken: Unbroken, name: str, num_free: int, num_wanted: int, num_failed: list[int]) -> list[str]:
    with small_disk(ground.path(name), _DISK_BYTES) as run:
        with ground.fork(name, fault=_SLOW) as job:
            problems = _starve(job, run, num_free, num_wanted)
            before = last_commit(run)
            (run / "filler").unlink()
            job.until(lambda: last_commit(run) > before, "nothing was committed on the disk that was freed")
            end_in_order(job)
            told = _num_warned(job)
        failed = [line for line in read_json_lines(run / "metrics.jsonl") if "checkpoint/failed_step" in line]
        num_failed.append(len(failed))
        if not num_wanted <= len(failed) == told:
            problems.append(f"{len(failed)} failures in the metrics, {told} in the log, {num_wanted} at least there were")
        if [line["checkpoint/failures_in_a_row"] for line in failed] != list(range(1, len(failed) + 1)):
            problems.append(f"counted as {failed}")
        # At the end of a run the last step is tried again and again; before it each is another one.
        if len({line["checkpoint/failed_step"] for line in failed}) < 2:
            problems.append("training did not go on while the disk was full")
        problems += unbroken.problems(run, last_step=_STEPS) + [f"{left} was left" for left in left_in(run / "checkpoints")]
        problems += ["DONE is missing"] * (not (run / "DONE").is_file())
    return [f"{name}: {problem}" for problem in problems]


def _starve(job: ForkedJob, run: Path, num_free: int, num_wanted: int) -> list[str]:
    """Keep the disk full until so many saves have failed; what is wrong with the checkpoint that was there before."""
    job.until(lambda: last_commit(run) > 0, "nothing was committed")
    if not num_free:
        job.until(lambda: list((run / "checkpoints").glob(".step_*")), "no save began")
    with (run / "filler").open("wb", buffering=0) as filler:

        def have_failed() -> bool:
            _leave(num_free, run, filler.write)
            return _num_warned(job) >= num_wanted

        job.until(have_failed, f"{num_wanted} saves did not fail")
    # Each raises where it is not whole.
    return [] if [verify(folder).step for _, folder in committed(run / "checkpoints")] else ["no checkpoint was left"]


def _num_warned(job: ForkedJob) -> int:
    lines = job.log.read_text(errors="replace").splitlines()
    return sum(_WARNING in line and _REASON in line for line in lines)


def _leave(num_free: int, run: Path, write: Callable[[bytes], int | None]) -> None:
    """Take what is free beyond so many bytes; what others take meanwhile is theirs."""
    try:
        write(bytes(max(0, free_bytes(run) - num_free)))
    except OSError:
        # Full to the last page.
        return


DRILLS = (Drill("with the engine: a disk that fills up and is freed", fill_and_free, needs_engine=True),)
