"""A disk that is really full, and one that is really read-only: a small tmpfs in a mount namespace, under the real saver."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.mounts import free_bytes, mount, small_disk, tally_inside
from benchmarks.drills.training import Trainer, judged_in_training, next_works
from megamm.checkpoint.saver import Failed

_COUNTS: dict[Size, int] = {"quick": 2, "normal": 60, "full": 600}
_DISK_BYTES = 8 << 20


def refused_by_the_kernel(size: Size, folder: Path) -> Tally:
    """By turns: something else takes all but a random rest of the disk; the file system is mounted anew for reading alone."""
    return tally_inside(__name__, size, folder)


def _fill(trainer: Trainer, run: Path, rng: random.Random) -> str:
    with trainer.saver(run / "checkpoints", keep_last=1) as saver:
        first = trainer.save(saver)
        filler = run / "filler"
        num_free = rng.randint(0, _num_bytes(run))
        filler.write_bytes(bytes(max(0, free_bytes(run) - num_free)))
        second = trainer.save(saver)
        if not isinstance(second, Failed) or os.strerror(errno.ENOSPC) not in second.reason:
            return f"{second} with {num_free} bytes free"
        if (newest := trainer.newest(run / "checkpoints")) != first.step:
            return f"step {newest} is the newest"
        filler.unlink()
        return next_works(trainer, saver, run)


def _lock_up(trainer: Trainer, run: Path) -> str:
    with trainer.saver(run / "checkpoints", keep_last=1) as saver:
        first = trainer.save(saver)
        mount("-o", "remount,ro", str(run.parent))
        second = trainer.save(saver)
        newest = trainer.newest(run / "checkpoints")
        mount("-o", "remount,rw", str(run.parent))
        if not isinstance(second, Failed) or os.strerror(errno.EROFS) not in second.reason or newest != first.step:
            return f"{second}, step {newest} is the newest"
        return next_works(trainer, saver, run)


def _num_bytes(run: Path) -> int:
    """Just less than what another checkpoint takes."""
    return sum(path.stat().st_size for path in run.rglob("rank_*")) - 1


def inside(folder: Path, size: Size) -> tuple[list[str], str]:
    """In a namespace where mounts are allowed: the problem of each try, and a note."""

    def judge(trainer: Trainer) -> list[str]:
        problems = []
        for number in range(_COUNTS[size]):
            run = disk / f"run-{number}"
            run.mkdir()
            problem = _lock_up(trainer, run) if number % 2 else _fill(trainer, run, random.Random(number))
            problems.append(problem and f"{'read-only' if number % 2 else 'full'}, try {number}: {problem}")
            shutil.rmtree(run)
        return problems

    with small_disk(folder / "disk", _DISK_BYTES) as disk:
        return judged_in_training(judge), f"by turns, on a tmpfs of {_DISK_BYTES >> 20} MiB in a mount namespace"


DRILLS = (Drill("a disk that is really full, a mount that is really read-only", refused_by_the_kernel),)
