"""Disks that refuse, stall and rot under the real saver, while one rank trains."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.saving import names_in
from benchmarks.drills.training import Trainer, judged_in_training, next_works
from megamm.checkpoint.commit import Progress
from megamm.checkpoint.io import Buffer
from megamm.checkpoint.manifest import step_folder
from megamm.checkpoint.saver import Committed, Failed
from megamm.core.errors import CheckpointError
from tests.support.faults import Broken, WatchedIo

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
_STRIDE: dict[Size, int] = {"quick": 13, "normal": 1, "full": 1}
_PATIENCE_SECONDS = 60.0


class FaultyIo(WatchedIo):
    """Operation `at`, counted from when it was armed, meets a fault. State: the operations since then, with what they work on."""

    def __init__(self) -> None:
        super().__init__(self._reach)
        self.operations: list[tuple[str, str]] = []
        self._at = -1
        self._fault: Callable[[], None] = lambda: None

    def arm(self, at: int = -1, fault: Callable[[], None] = lambda: None) -> None:
        """Count anew, and put the fault to operation `at`; to none without it."""
        self.operations, self._at, self._fault = [], at, fault

    def _reach(self, number: int, name: str, path: Path) -> None:
        self.operations.append((name, path.name))
        if len(self.operations) - 1 == self._at:
            self._fault()


class RottenIo(FaultyIo):
    """What is written by operation `at` reaches the disk with a bit flipped, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.change: Callable[[bytes], bytes] | None = None

    def write(self, file, block: Buffer) -> None:
        """Write, once with the change."""
        change, self.change = (self.change, None) if len(self.operations) == self._at else (None, self.change)
        super().write(file, block if change is None else change(bytes(block)))


def refused(size: Size, folder: Path) -> Tally:
    """Each error at each operation of a save and of what it retires: counted, and the next save works."""

    def judge(trainer: Trainer) -> list[str]:
        operations = _operations(trainer, folder / "counted")
        commit = _commit_in(operations)
        problems = []
        for at, number in [(at, number) for at in range(len(operations)) for number in ERRORS][:: _STRIDE[size]]:
            problem = _refuse(trainer, folder / f"{at}-{number}", at, number, commit)
            problems.append(problem and f"{errno.errorcode[number]} at operation {at} {operations[at]}: {problem}")
        return problems

    return Tally.of(judged_in_training(judge), f"{', '.join(errno.errorcode[number] for number in ERRORS)}; training goes on")


def _refuse(trainer: Trainer, run: Path, at: int, number: int, commit: int) -> str:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    io, folder = FaultyIo(), run / "checkpoints"
    with trainer.saver(folder, io, keep_last=1) as saver:
        first = trainer.save(saver)
        io.arm(at, fail)
        second = trainer.save(saver)
        io.arm()
        newest = trainer.newest(folder)
        if at <= commit and (not isinstance(second, Failed) or newest != first.step or os.strerror(number) not in second.reason):
            return f"{second}, step {newest} is the newest"
        if isinstance(second, Failed) and second.num_in_a_row != 1:
            return f"counted as {second.num_in_a_row} in a row"
        if newest not in (first.step, second.step) or (isinstance(second, Committed) and newest != second.step):
            return f"{second}, step {newest} is the newest"
        return next_works(trainer, saver, run)


def refused_for_good(size: Size, folder: Path) -> Tally:
    """A disk that never recovers ends the run after so many failures, in words, with the older checkpoint as it was."""

    def judge(trainer: Trainer) -> list[str]:
        names = ("make_folder", "create", "write", "sync", "sync_folder", "rename")
        tries = [(name, number, most) for name in names for number in ERRORS for most in (1, 3)]
        problems = []
        for name, number, most in tries[:: _STRIDE[size]]:
            problem = _exhaust(trainer, folder / f"{name}-{number}-{most}", name, number, most)
            problems.append(problem and f"{errno.errorcode[number]} at every {name}: {problem}")
        return problems

    return Tally.of(judged_in_training(judge), "checkpoint.max_failures 1 and 3")


def _exhaust(trainer: Trainer, run: Path, name: str, number: int, most: int) -> str:
    io, folder = Broken(name), run / "checkpoints"
    outcomes: list[Committed | Failed] = []
    try:
        with trainer.saver(folder, io, max_failures=most) as saver:
            first = trainer.save(saver)
            io.error_number = number
            for _ in range(most):
                outcomes.append(trainer.save(saver))
    except CheckpointError as error:
        if not error.on_all_ranks or os.strerror(number) not in str(error) or f"{most} failures in a row" not in str(error):
            return f"other words: {error}"
        if len(outcomes) != most - 1 or trainer.newest(folder) != first.step:
            return f"after {outcomes}, step {trainer.newest(folder)} is the newest"
        return ""
    return f"went on after {outcomes}"


def stalled(size: Size, folder: Path) -> Tally:
    """The disk stands still at each operation: training does not, and the save is there once the disk goes on."""

    def judge(trainer: Trainer) -> list[str]:
        operations = _operations(trainer, folder / "counted")
        problems = []
        for at in range(len(operations))[:: _STRIDE[size]]:
            problem = _stall(trainer, folder / str(at), at)
            problems.append(problem and f"stalled at operation {at} {operations[at]}: {problem}")
        return problems

    return Tally.of(judged_in_training(judge), "three steps are trained meanwhile")


def _stall(trainer: Trainer, run: Path, at: int) -> str:
    is_reached, may_go_on = threading.Event(), threading.Event()

    def stall() -> None:
        is_reached.set()
        may_go_on.wait(_PATIENCE_SECONDS)

    io = FaultyIo()
    with trainer.saver(run / "checkpoints", io, keep_last=1) as saver:
        trainer.save(saver)
        io.arm(at, stall)
        step = trainer.train()
        saver.save(Progress(step, {"row": step}))
        outcomes = []
        while not is_reached.is_set() and saver.is_pending:
            outcomes += saver.poll()
        for _ in range(3):
            trainer.train()
            outcomes += saver.poll()
        if outcomes or not saver.is_pending:
            return f"not waited for: {outcomes}"
        may_go_on.set()
        outcomes += saver.finish()
        if [type(outcome) for outcome in outcomes] != [Committed] or trainer.newest(run / "checkpoints") != step:
            return f"{outcomes}, step {trainer.newest(run / 'checkpoints')} is the newest"
        return next_works(trainer, saver, run)


def rotten(size: Size, folder: Path) -> Tally:
    """Bytes change between the write and the disk, in every file: read back, set aside, and the older one stays."""
    changes: dict[str, Callable[[bytes], bytes]] = {
        "a flipped bit": lambda block: block[:-1] + bytes([block[-1] ^ 1]),
        "zeros": lambda block: bytes(len(block)),
        "a lost write": lambda block: b"",
    }

    def judge(trainer: Trainer) -> list[str]:
        operations = _operations(trainer, folder / "counted")
        writes = [at for at, (name, _) in enumerate(operations) if name == "write"]
        problems = []
        for at, name in [(at, name) for at in writes for name in changes][:: 5 if size == "quick" else 1]:
            problem = _rot(trainer, folder / f"{at}-{name.replace(' ', '-')}", at, changes[name])
            problems.append(problem and f"{name} in {operations[at][1]}: {problem}")
        return problems

    return Tally.of(judged_in_training(judge), f"{', '.join(changes)}, in every write of a save, the manifest's included")


def _rot(trainer: Trainer, run: Path, at: int, change: Callable[[bytes], bytes]) -> str:
    io, folder = RottenIo(), run / "checkpoints"
    with trainer.saver(folder, io, keep_last=1) as saver:
        first = trainer.save(saver)
        io.arm(at)
        io.change = change
        second = trainer.save(saver)
        io.arm()
        if not isinstance(second, Failed) or "reads back damaged" not in second.reason:
            return f"{second}"
        if names_in(run) != [step_folder(first.step), f"{step_folder(second.step)}.damaged-1"]:
            return f"left in the folder: {names_in(run)}"
        if trainer.newest(folder) != first.step:
            return f"step {trainer.newest(folder)} is the newest"
        return next_works(trainer, saver, run)


def _operations(trainer: Trainer, run: Path) -> list[tuple[str, str]]:
    """Every file operation of a save that replaces another one, while nothing goes wrong."""
    io = FaultyIo()
    with trainer.saver(run / "checkpoints", io, keep_last=1) as saver:
        trainer.save(saver)
        io.arm()
        trainer.save(saver)
    return io.operations


def _commit_in(operations: list[tuple[str, str]]) -> int:
    return next(at for at, (name, what) in enumerate(operations) if name == "rename" and what.endswith(".tmp"))


DRILLS = (
    Drill("ENOSPC, EIO and EROFS at every operation of a save", refused),
    Drill("a disk that never recovers", refused_for_good),
    Drill("a disk that stands still at every operation of a save", stalled),
    Drill("bytes that change between a write and the disk", rotten),
)
