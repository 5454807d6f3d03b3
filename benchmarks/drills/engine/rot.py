"""A shard whose bytes change under a run: written to, which ends the run by name, or rotten, which costs the one sample."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.drills.engine import recipe
from benchmarks.drills.engine.equality import Unbroken, last_commit, numbers
from benchmarks.drills.engine.ground import Ground
from benchmarks.drills.engine.jobs import ForkedJob
from megamm.checkpoint.manifest import committed, read_ledger
from megamm.data.shards.index import load_index

_SAMPLE = 5
_KEY = f"p{_SAMPLE:03d}"
_ROTTEN = b"rotten"
_SAMPLE_STEPS = 10
"""A pass over the pictures takes fewer steps, so that the sample is read."""


@contextmanager
def changed_sample(ground: Ground, *, is_rot: bool) -> Iterator[None]:
    """Bytes of one picture are others inside; afterwards the shard is as it was.

    Args:
        ground: Whose shard.
        is_rot: The time of the last change stays, as where a disk loses bytes; else it is of now, as where somebody writes.
    """
    tar = ground.folder / recipe.DATA / recipe.PICTURES
    member = next(member for member in load_index(tar).members(_SAMPLE) if member.suffix == "0.jpg")
    facts = tar.stat()
    with tar.open("r+b", buffering=0) as file:
        place = member.offset + member.size // 2
        healthy = os.pread(file.fileno(), len(_ROTTEN), place)
        os.pwrite(file.fileno(), _ROTTEN, place)
        if is_rot:
            os.utime(tar, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        try:
            yield
        finally:
            os.pwrite(file.fileno(), healthy, place)
            os.utime(tar, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def write_under(ground: Ground, run: str) -> list[str]:
    """The run must end, name the shard, and leave a checkpoint that the healed shard goes on from."""
    with ground.fork(run) as job:
        _commit_more(job, ground.path(run))
        with changed_sample(ground, is_rot=False):
            statuses = job.wait()
        job.leave_nothing()
        words = job.last_words()
    if 0 in statuses or "train-00000.tar was replaced or modified while it was read" not in words:
        return [f"ended with {statuses} and did not name the shard: {words}"]
    return []


def rot_under(ground: Ground, run: str) -> list[str]:
    """The run must go on without the sample."""
    with ground.fork(run) as job:
        _commit_more(job, ground.path(run))
        with changed_sample(ground, is_rot=True):
            seen = last_commit(ground.path(run))
            job.until(lambda: last_commit(ground.path(run)) > seen + _SAMPLE_STEPS, "nothing more was committed")
            return job.stop()


def _commit_more(job: ForkedJob, run: Path) -> None:
    before = last_commit(run)
    job.until(lambda: last_commit(run) > before, "nothing more was committed")


def problems_of_rot(unbroken: Unbroken, run: Path, num_healthy: int) -> list[str]:
    """Up to step `num_healthy` all must be equal, bit for bit; beyond it the samples, and the ledger names the one that rotted."""
    lines, expected = numbers(run), unbroken.lines
    problems = [f"step {step} has other samples" for step, line in lines.items() if line["sample_keys"] != expected[step]["sample_keys"]]
    problems += [f"step {step} has another loss" for step in range(1, num_healthy + 1) if lines[step]["loss"] != expected[step]["loss"]]
    compared = [(step, path) for step, path in committed(run / "checkpoints") if step <= num_healthy and step in unbroken.positions]
    for step, path in compared:
        problems += unbroken.problems_of_checkpoint(step, path)
    new = _keys_of_ledger(run) - _keys_of_ledger(unbroken.run)
    if new != {_KEY}:
        problems.append(f"the ledger names {sorted(new)} besides what was rotten before, not {_KEY}")
    return problems + [f"no checkpoint of {len(lines)} steps was there to be compared"] * (not compared)


def _keys_of_ledger(run: Path) -> set[str]:
    return {entry["key"] for entry in read_ledger(committed(run / "checkpoints")[-1][1])}
