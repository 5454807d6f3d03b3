"""SIGKILL of each rank at every operation of a save, and of whoever recovers or re-shards at each of theirs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.ranks import Ended, run_ranks
from benchmarks.drills.saving import names_in, problem_with, save_together, state_at
from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.commit import Attempt, write_files
from megamm.checkpoint.fence import LOCK, Fence
from megamm.checkpoint.hold import hold_run
from megamm.checkpoint.io import LOCAL, Io
from megamm.checkpoint.manifest import read_manifest, step_folder
from megamm.checkpoint.reshard import reshard
from megamm.engine.distributed import World
from tests.support.faults import KilledIo, recording

LEASE_SECONDS = 60.0
# Ranks that save, ranks that recover.
WORLDS: dict[Size, list[tuple[int, int]]] = {"quick": [(2, 1)], "normal": [(3, 2)], "full": [(3, 2), (1, 3), (4, 4)]}
Operation: TypeAlias = tuple[str, str]
"""What is done, and the name of what it is done to."""


def kill_while_saving(size: Size, folder: Path) -> Tally:
    """Every rank, at every operation: before and after it, and in the middle of a write."""
    problems: list[str] = []
    for num_ranks, num_later in WORLDS[size]:
        template = _template(folder / f"template-{num_ranks}", num_ranks)
        operations = _operations(template, num_ranks)
        tries = [(rank, at, moment) for rank in range(num_ranks) for at, moment in _moments(operations[rank])]
        for victim, at, moment in _share(tries, size):
            with _copy(template) as run:
                ended = run_ranks(lambda world, run=run, die=(victim, at, moment): _go_on(run, world, _deadly(world, *die)), num_ranks)
                is_committed = victim == 0 and _is_past_commit(operations[0], at, moment)
                problem = _not_killed(ended, victim) or _recover(run, 20 if is_committed else 10, num_later)
            problems.append(problem and f"rank {victim} killed {moment} operation {at} {operations[victim][at]}: {problem}")
    return Tally.of(problems, f"ranks that save → recover: {', '.join(f'{before} → {after}' for before, after in WORLDS[size])}")


def kill_while_recovering(size: Size, folder: Path) -> Tally:
    """The owner that sets a damaged checkpoint aside, sweeps what a dead one left, and saves that step again."""
    problems: list[str] = []
    template = _template(folder / "template", 2)
    run_ranks(lambda world: _go_on(template, world, LOCAL), 2)
    shard = template / "checkpoints" / "step_00000020" / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    operations = _operations(template, 1)[0]
    for at, moment in _share(_moments(operations), size):
        with _copy(template) as run:
            ended = run_ranks(lambda world, run=run, die=(0, at, moment): _go_on(run, world, _deadly(world, *die)), 1)
            is_committed = _is_past_commit(operations, at, moment)
            problem = _not_killed(ended, 0) or _recover(run, 20 if is_committed else 10, 2, kept=["step_00000020.damaged-1"])
        problems.append(problem and f"killed {moment} operation {at} {operations[at]}: {problem}")
    return Tally.of(problems)


def kill_while_resharding(size: Size, folder: Path) -> Tally:
    """`megamm checkpoint reshard` at each of its operations; then the same command again, and a run that goes on from its result."""
    problems: list[str] = []
    source = _template(folder / "source", 2) / "checkpoints" / "step_00000010"
    operations: list[Operation] = []
    reshard(source, folder / "counted" / "checkpoints", 3, io=recording(operations))
    for at, moment in _share(_moments(operations), size):
        target = folder / "run" / "checkpoints"
        ended = run_ranks(lambda world, target=target, die=(at, moment): str(reshard(source, target, 3, io=KilledIo(*die))), 1)
        problem = _not_killed(ended, 0)
        if (target / "step_00000010").is_dir() != _is_past_commit(operations, at, moment):
            problem = problem or "the name came before the last byte, or not at all"
        elif not (target / "step_00000010").is_dir():
            reshard(source, target, 3)
        problem = problem or _recover(target.parent, 10, 2)
        problems.append(problem and f"killed {moment} operation {at} {operations[at]}: {problem}")
        shutil.rmtree(target.parent)
    return Tally.of(problems)


def _template(run: Path, num_ranks: int) -> Path:
    """A run of two checkpoints, with a torn save and a deletion that was cut short."""

    def begin(world: World) -> None:
        with hold_run(run, world, lease_seconds=LEASE_SECONDS) as hold:
            hold.started_at(0)
            for step in (5, 10):
                save_together(run, state_at(step), world, hold)

    _check_no_error(run_ranks(begin, num_ranks))
    write_files(Attempt(run / "checkpoints", 20, Fence(1), 9), {"rank_00000.safetensors": [b"torn"]}, LOCAL)
    shutil.copytree(run / "checkpoints" / "step_00000005", run / "checkpoints" / ".step_00000002.deleted")
    return run


def _go_on(run: Path, world: World, io: Io) -> None:
    """Resume from the newest good checkpoint and save step 20."""
    with hold_run(run, world, lease_seconds=LEASE_SECONDS) as hold:
        choice = newest_good(run / "checkpoints", world, hold=hold, io=io)
        assert choice.folder is not None, "there is an older one"
        hold.started_at(read_manifest(choice.folder).step)
        save_together(run, state_at(20), world, hold, io=io)


def _recover(run: Path, step: int, num_ranks: int, kept: Sequence[str] = ()) -> str:
    """Go on from `step`, save step 30, and look at what is there then; what is wrong, empty for nothing."""

    def recover(world: World) -> str:
        with hold_run(run, world, lease_seconds=LEASE_SECONDS) as hold:
            choice = newest_good(run / "checkpoints", world, hold=hold)
            if choice.folder is None or choice.folder.name != step_folder(step):
                return f"{choice.folder} was chosen, not {step_folder(step)}: {choice.damaged}"
            problem = problem_with(choice.folder, state_at(step), num_ranks=world.size)
            hold.started_at(step)
            save_together(run, state_at(30), world, hold)
        return problem

    ended = run_ranks(recover, num_ranks)
    problem = next((one.error or one.result for one in ended if one.error or one.result), "")
    if not problem and names_in(run) != sorted([step_folder(step), step_folder(30), *kept]):
        problem = f"left in the folder: {', '.join(names_in(run))}"
    if not problem and (drafts := sorted(path.name for path in (run / LOCK).iterdir() if path.name.startswith("."))):
        problem = f"left in {LOCK}: {', '.join(drafts)}"
    return problem or problem_with(run / "checkpoints" / step_folder(30), state_at(30))


def _operations(template: Path, num_ranks: int) -> list[list[Operation]]:
    """Every file operation of each rank, while nothing goes wrong."""

    def record(world: World) -> list[Operation]:
        operations: list[Operation] = []
        _go_on(run, world, recording(operations))
        return operations

    with _copy(template) as run:
        ended = run_ranks(record, num_ranks)
    _check_no_error(ended)
    return [one.result for one in ended]


def _moments(operations: Sequence[Operation]) -> list[tuple[int, str]]:
    """Every (operation, moment) at which a process can be killed."""
    return [
        (at, moment)
        for at, (name, _) in enumerate(operations)
        for moment in ("before", "middle", "after")
        if moment != "middle" or name == "write"
    ]


def _is_past_commit(operations: Sequence[Operation], at: int, moment: str) -> bool:
    """Whether the rename that commits was done by then."""
    commit = next(index for index, (name, what) in enumerate(operations) if name == "rename" and what.endswith(".tmp"))
    return at > commit or (at, moment) == (commit, "after")


def _share(tries: Sequence, size: Size) -> Sequence:
    # Eleven divides no period of the operations, so that the few tries are of all kinds.
    return tries[::11] if size == "quick" else tries


@contextmanager
def _copy(template: Path) -> Iterator[Path]:
    """A copy to do harm to."""
    run = template.with_name("run")
    shutil.copytree(template, run, symlinks=True)
    try:
        yield run
    finally:
        shutil.rmtree(run)


def _deadly(world: World, victim: int, at: int, moment: str) -> Io:
    return KilledIo(at, moment) if world.rank == victim else LOCAL


def _not_killed(ended: Sequence[Ended], victim: int) -> str:
    return "" if ended[victim].status == -9 else f"it was to be killed and ended with {ended[victim]}"


def _check_no_error(ended: Sequence[Ended]) -> None:
    errors = [one for one in ended if one.error or one.status]
    if errors:
        raise RuntimeError(f"ranks that nothing was done to failed: {errors}")


DRILLS = (
    Drill("SIGKILL of each rank at every operation of a save", kill_while_saving),
    Drill("SIGKILL at every operation of a recovery", kill_while_recovering),
    Drill("SIGKILL at every operation of a re-shard", kill_while_resharding),
)
