"""A disk that is really full, and one that is really read-only: a small tmpfs in a mount namespace, under the real saver.

The drill starts this file again inside of the namespace: `python -m benchmarks.drills.full_disk FOLDER NUM_TRIES`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.training import Trainer, judged_in_training, next_works
from megamm.checkpoint.saver import Failed

_COUNTS: dict[Size, int] = {"quick": 2, "normal": 60, "full": 600}
_DISK_BYTES = 8 << 20
_NOT_ALLOWED = 77
_ROOT = Path(__file__).resolve().parents[2]


def refused_by_the_kernel(size: Size, folder: Path) -> Tally:
    """By turns: something else takes all but a random rest of the disk; the file system is mounted anew for reading alone."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return Tally(0, 0, 0, "not tried: no program unshare here")
    command = [unshare, "--map-root-user", "--mount", sys.executable, "-m", "benchmarks.drills.full_disk"]
    ended = subprocess.run([*command, str(folder), str(_COUNTS[size])], cwd=_ROOT, stdout=subprocess.DEVNULL, check=False)
    answer = folder / "problems.json"
    if answer.is_file():
        return Tally.of(json.loads(answer.read_text()), f"by turns, on a tmpfs of {_DISK_BYTES >> 20} MiB in a mount namespace")
    # One is what unshare itself ends with where the kernel refuses.
    if ended.returncode in (1, _NOT_ALLOWED):
        return Tally(0, 0, 0, "not tried: namespaces or mounts are not allowed here")
    raise RuntimeError(f"the drill inside of the namespace ended with {ended.returncode}")


def _fill(trainer: Trainer, run: Path, rng: random.Random) -> str:
    with trainer.saver(run / "checkpoints", keep_last=1) as saver:
        first = trainer.save(saver)
        disk = os.statvfs(run)
        filler = run / "filler"
        num_free = rng.randint(0, _num_bytes(run))
        filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - num_free)))
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
        _mount("-o", "remount,ro", str(run.parent))
        second = trainer.save(saver)
        newest = trainer.newest(run / "checkpoints")
        _mount("-o", "remount,rw", str(run.parent))
        if not isinstance(second, Failed) or os.strerror(errno.EROFS) not in second.reason or newest != first.step:
            return f"{second}, step {newest} is the newest"
        return next_works(trainer, saver, run)


def _num_bytes(run: Path) -> int:
    """Just less than what another checkpoint takes."""
    return sum(path.stat().st_size for path in run.rglob("rank_*")) - 1


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main(folder: Path, num_tries: int) -> int:
    """Mount a disk, try, and leave the problems in a file."""
    disk = folder / "disk"
    disk.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(disk))
    except (OSError, subprocess.CalledProcessError):
        return _NOT_ALLOWED

    def judge(trainer: Trainer) -> list[str]:
        problems = []
        for number in range(num_tries):
            run = disk / f"run-{number}"
            run.mkdir()
            problem = _lock_up(trainer, run) if number % 2 else _fill(trainer, run, random.Random(number))
            problems.append(problem and f"{'read-only' if number % 2 else 'full'}, try {number}: {problem}")
            shutil.rmtree(run)
        return problems

    (folder / "problems.json").write_text(json.dumps(judged_in_training(judge)))
    return 0


DRILLS = (Drill("a disk that is really full, a mount that is really read-only", refused_by_the_kernel),)

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
