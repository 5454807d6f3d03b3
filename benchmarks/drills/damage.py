"""Damage to every file of a checkpoint and of a run's lock: noticed, named, set aside, and the older checkpoint taken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.ranks import judged
from benchmarks.drills.saving import names_in, problem_with, save_alone, state_at
from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.fence import LOCK, Fence
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.lock import RunLock
from megamm.checkpoint.manifest import verify
from megamm.core.errors import CheckpointError
from megamm.engine.distributed import World

NUM_RANKS = 3
_PAGE_BYTES = 512
Harm = Callable[[bytes, random.Random], "bytes | None"]
"""A file's bytes -> other bytes, or None for no file."""


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit is another one."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """A page that never reached the disk."""
    pages = [at for at in range(0, len(content), _PAGE_BYTES) if any(content[at : at + _PAGE_BYTES])]
    at = rng.choice(pages)
    page = content[at : at + _PAGE_BYTES]
    return content[:at] + bytes(len(page)) + content[at + len(page) :]


def truncated(content: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return content[: rng.choice([0, len(content) - 1, rng.randrange(len(content))])]


def extended(content: bytes, rng: random.Random) -> bytes:
    """Something follows that was never written: white space, zeros, noise, the file once more."""
    return content + rng.choice([b" ", b"\n", bytes(_PAGE_BYTES), rng.randbytes(7), content])


def shuffled(content: bytes, rng: random.Random) -> bytes:
    """Two blocks of equal length have changed places."""
    num_bytes = rng.randint(1, len(content) // 2)
    for _ in range(100):
        one, other = sorted(rng.randrange(len(content) - num_bytes + 1) for _ in range(2))
        first, second = content[one : one + num_bytes], content[other : other + num_bytes]
        if other >= one + num_bytes and first != second:
            return content[:one] + second + content[one + num_bytes : other] + first + content[other + num_bytes :]
        num_bytes = max(1, num_bytes // 2)
    return content[1:] + content[:1]


def noise(content: bytes, rng: random.Random) -> bytes:
    """Another file of the same length."""
    return rng.randbytes(len(content))


def deleted(content: bytes, rng: random.Random) -> None:
    """No such file."""


# What is done, and how often in the normal table.
HARMS: Mapping[str, tuple[Harm, int]] = {
    "bit flips": (flipped, 600),
    "pages of zeros": (zeroed, 200),
    "truncations": (truncated, 200),
    "extensions": (extended, 100),
    "blocks that changed places": (shuffled, 60),
    "noise": (noise, 60),
    "deletions": (deleted, 60),
}
_SHARE: Mapping[Size, float] = {"quick": 0.05, "normal": 1.0, "full": 10.0}


def harm_checkpoint(harm: str, size: Size, folder: Path) -> Tally:
    """Harm a file of the newer of two checkpoints, each file type in its turn, and choose where to go on."""
    change, num_tries = HARMS[harm]
    run, whole = _template(folder)
    names = sorted(path.name for path in whole.iterdir())

    def judge(world: World) -> list[str]:
        rng = random.Random(f"{harm} {size}")
        problems = []
        # At least each file once.
        for number in range(max(len(names), round(num_tries * _SHARE[size]))):
            name = names[number % len(names)]
            newest = Path(shutil.copytree(whole, run / "checkpoints" / whole.name))
            _apply(change, newest / name, rng)
            problem = _judge(run, newest, name, world)
            problems.append(problem and f"{harm}, {name}, try {number}: {problem}")
            for left in run.glob(f"checkpoints/{whole.name}*"):
                shutil.rmtree(left)
        return problems

    return Tally.of(judged(judge), f"{len(names)} files, by turns")


def harm_lock(size: Size, folder: Path) -> Tally:
    """Harm the record of the run's owner: whoever would go on is told, and nothing that it decides is guessed."""
    run, whole = _template(folder)
    shutil.copytree(whole, run / "checkpoints" / whole.name)
    harms = {name: change for name, (change, _) in HARMS.items() if change is not deleted}

    def judge(world: World) -> list[str]:
        rng = random.Random(size)
        problems = []
        owner = sorted((run / LOCK).glob("*.owner"))[-1]
        content = owner.read_bytes()
        for number in range(round(200 * _SHARE[size])):
            name, change = list(harms.items())[number % len(harms)]
            _apply(change, owner, rng)
            problem = _not_refused(run, owner.name)
            choice = newest_good(run / "checkpoints", world)
            if not problem and (choice.folder or len(choice.damaged) != 2 or not all(LOCK in why for why in choice.damaged.values())):
                problem = f"chose {choice.folder}, damaged {choice.damaged}"
            owner.write_bytes(content)
            problems.append(problem and f"{name}, try {number}: {problem}")
        choice = newest_good(run / "checkpoints", world)
        if choice.folder is None or choice.folder.name != whole.name:
            problems.append(f"with the record restored, {choice.folder} was chosen: {choice.damaged}")
        return problems

    return Tally.of(judged(judge), "names the file; with the record restored all is as before")


def harm_lease(size: Size, folder: Path) -> Tally:
    """Harm the lease of an owner that lives: it keeps the run, and the next one is refused."""
    run, _ = _template(folder)
    harms = {name: change for name, (change, _) in HARMS.items()}

    def judge(world: World) -> list[str]:
        rng = random.Random(size)
        problems = []
        lock = RunLock.acquire(run, lease_seconds=0.6)
        lease = run / LOCK / f"{lock.number:08d}.lease"
        for number in range(max(len(harms), round(100 * _SHARE[size]))):
            name, change = list(harms.items())[number % len(harms)]
            while not (content := lease.read_bytes()):
                pass
            try:
                changed = change(content, rng)
                lease.unlink(missing_ok=True) if changed is None else lease.write_bytes(changed)
                problem = _not_refused(run, "is in use by")
                lock.check()
            except CheckpointError as error:
                problem = f"the owner lost the run: {error}"
            problems.append(problem and f"{name}, try {number}: {problem}")
        lock.release()
        RunLock.acquire(run, lease_seconds=60.0).release()
        return problems

    return Tally.of(judged(judge), "the owner keeps the run, the next one is refused")


def _template(folder: Path) -> tuple[Path, Path]:
    """A run with an owner in its past and one checkpoint, and a newer checkpoint beside it."""
    run = folder / "run"
    for _ in range(2):
        lock = RunLock.acquire(run, lease_seconds=60.0)
        lock.started_at(0)
        lock.release()
    hold = Hold(Fence(lock.number))
    save_alone(run, state_at(10), NUM_RANKS, hold=hold)
    newest = save_alone(run, state_at(20), NUM_RANKS, hold=hold)
    return run, Path(shutil.move(newest, folder / newest.name))


def _apply(change: Harm, path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    changed = change(content, rng)
    if changed is None:
        path.unlink()
        return
    while changed == content:
        changed = change(content, rng)
    path.write_bytes(changed)


def _judge(run: Path, newest: Path, name: str, world: World) -> str:
    try:
        verify(newest)
        return "verified as if it were whole"
    except CheckpointError as error:
        if name not in str(error):
            return f"another file was named: {error}"
    choice = newest_good(run / "checkpoints", world, hold=Hold())
    if choice.folder is None or choice.folder.name != "step_00000010":
        return f"{choice.folder} was chosen"
    if list(choice.damaged) != [newest.name] or name not in choice.damaged[newest.name]:
        return f"reported as {choice.damaged}"
    if names_in(run) != ["step_00000010", f"{newest.name}.damaged-1"]:
        return f"left in the folder: {names_in(run)}"
    return problem_with(choice.folder, state_at(10))


def _not_refused(run: Path, words: str) -> str:
    try:
        RunLock.acquire(run, lease_seconds=60.0).release()
    except CheckpointError as error:
        return "" if words in str(error) else f"refused with other words: {error}"
    return "the run was taken over"


def _drills() -> Iterator[Drill]:
    for harm in HARMS:
        yield Drill(f"{harm} in the files of a checkpoint", partial(harm_checkpoint, harm))
    yield Drill("damage to the record of a run's owner", harm_lock)
    yield Drill("damage to the lease of a living owner", harm_lease)


DRILLS = tuple(_drills())
