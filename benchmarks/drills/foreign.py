"""Whole and healthy files that do not belong: of another step, another run, ranks that are gone, owners that lost the run."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.ranks import judged
from benchmarks.drills.saving import files_of, names_in, problem_with, save_alone, state_at
from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.commit import Attempt, write_files
from megamm.checkpoint.fence import Fence
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.io import LOCAL
from megamm.checkpoint.lock import LostRun, RunLock
from megamm.checkpoint.manifest import MANIFEST, rank_file, read_manifest, step_folder
from megamm.checkpoint.reshard import reshard
from megamm.engine.distributed import World

NUM_RANKS = 3
_COUNTS: dict[Size, int] = {"quick": 10, "normal": 200, "full": 2000}


def swap_files(size: Size, folder: Path) -> Tally:
    """Replace some files of the newest checkpoint by those of the same name from elsewhere, its manifest among them."""
    run = folder / "run"
    older = save_alone(run, state_at(10), NUM_RANKS)
    newest = save_alone(run, state_at(20), NUM_RANKS)
    elsewhere = {
        "another step": older,
        "another run": save_alone(folder / "other-run", state_at(20, run=1), NUM_RANKS),
        "a smaller world": save_alone(folder / "smaller", state_at(20), NUM_RANKS - 1),
    }
    whole = Path(shutil.copytree(newest, folder / "whole"))

    def judge(world: World) -> list[str]:
        rng = random.Random(size)
        problems = []
        for number in range(_COUNTS[size]):
            place, source = list(elsewhere.items())[number % len(elsewhere)]
            # A file that is the same there and here is no swap; all of them are no mixture.
            others = [path.name for path in sorted(source.iterdir()) if path.read_bytes() != (whole / path.name).read_bytes()]
            names = rng.sample(others, rng.randint(1, len(others) - 1))
            for name in names:
                shutil.copy(source / name, newest / name)
            problem = _passed_over(run, newest, world)
            problems.append(problem and f"{', '.join(names)} of {place}: {problem}")
            _renew(newest, whole)
        return problems

    return Tally.of(judged(judge), f"from {', '.join(elsewhere)}")


def swap_folder(size: Size, folder: Path) -> Tally:
    """Give a whole checkpoint the name of a later step, with the newest one gone or pushed aside."""

    def judge(world: World) -> list[str]:
        problems = []
        for number in range(_COUNTS[size] // 10):
            run = folder / f"run-{number}"
            older = save_alone(run, state_at(10), 1 + number % NUM_RANKS)
            shutil.copytree(older, run / "checkpoints" / step_folder(11 + number))
            problems.append(_passed_over(run, run / "checkpoints" / step_folder(11 + number), world))
        return problems

    return Tally.of(judged(judge), "the manifest says another step than the name")


def stale_ranks(size: Size, folder: Path) -> Tally:
    """The world shrank: files of ranks that are no more lie in a torn save of the same step, and in the folder itself."""
    rng = random.Random(size)
    problems = []
    for number in range(_COUNTS[size] // 4):
        run = folder / f"run-{number}"
        before, after = sorted(rng.sample(range(1, 7), 2), reverse=True)
        torn = Attempt(run / "checkpoints", 20, Fence(1), 1)
        for rank in range(before):
            write_files(torn, files_of(state_at(20, run=1), rank, before), LOCAL)
        saved = save_alone(run, state_at(20), after, hold=Hold(Fence(2)))
        listed = sorted([*read_manifest(saved).files, MANIFEST])
        problem = "" if sorted(path.name for path in saved.iterdir()) == listed else "another world's files are in the folder"
        for rank in range(after, before):
            (saved / rank_file(rank)).write_bytes(b"".join(map(bytes, files_of(state_at(20, run=1), rank, before)[rank_file(rank)])))
        num_readers = rng.randint(1, 6)
        problem = problem or problem_with(saved, state_at(20), num_ranks=num_readers)
        resharded = reshard(saved, folder / f"target-{number}" / "checkpoints", num_readers)
        problem = problem or problem_with(resharded, state_at(20), num_ranks=after)
        if names_in(run) != [saved.name]:
            problem = problem or f"left in the folder: {names_in(run)}"
        problems.append(problem and f"{before} ranks, then {after}: {problem}")
    return Tally.of(problems, "worlds of 1 to 6 ranks, read by others")


def late_owners(size: Size, folder: Path) -> Tally:
    """Random histories of a run: owners go on from where they can, and owners of the past commit whatever they slept over."""

    def judge(world: World) -> list[str]:
        return [_history(folder / f"run-{number}", random.Random(number), world) for number in range(_COUNTS[size] // 2)]

    return Tally.of(judged(judge), "3 to 6 owners each; which checkpoint counts is worked out beside")


def _history(run: Path, rng: random.Random, world: World) -> str:
    starts: dict[int, int] = {}
    there: dict[int, int] = {}

    def commit(owner: int, step: int) -> str:
        try:
            save_alone(run, state_at(step, run=owner), rng.randint(1, 3), hold=Hold(Fence(owner)), keep_last=100)
        except LostRun:
            return "" if there.get(step, 0) > owner else f"owner {owner} could not commit step {step}"
        if there.get(step, 0) > owner:
            return f"owner {owner} replaced step {step} of owner {there[step]}"
        there[step] = owner
        return ""

    for owner in range(1, rng.randint(4, 7)):
        lock = RunLock.acquire(run, lease_seconds=60.0)
        if problem := _choose(run, starts, there, world):
            return problem
        starts[owner] = _newest(starts, there) or 0
        lock.started_at(starts[owner])
        for _ in range(rng.randint(0, 3)):
            late = rng.randint(1, owner)
            step = starts[owner] + 10 * rng.randint(1, 2) if late == owner else 10 * rng.randint(1, 6)
            if problem := commit(late, step):
                return problem
        lock.release()
    return _choose(run, starts, there, world)


def _choose(run: Path, starts: dict[int, int], there: dict[int, int], world: World) -> str:
    """Compare the choice with the rule, spelled out; what is passed over is set aside, here as there."""
    expected = _newest(starts, there)
    choice = newest_good(run / "checkpoints", world, hold=Hold())
    found = None if choice.folder is None else read_manifest(choice.folder).step
    if found != expected:
        return f"step {found} was chosen, not {expected}: owners started at {starts}, steps are of {there}"
    if choice.folder is None or expected is None:
        return ""
    for step in [step for step in there if step > expected]:
        del there[step]
    return problem_with(choice.folder, state_at(expected, run=there[expected]))


def _newest(starts: dict[int, int], there: dict[int, int]) -> int | None:
    """The newest step that was committed by nobody from before whom a later owner had gone on."""
    counting = [step for step, by in there.items() if not any(owner > by and start < step for owner, start in starts.items())]
    return max(counting, default=None)


def _passed_over(run: Path, newest: Path, world: World) -> str:
    choice = newest_good(run / "checkpoints", world, hold=Hold())
    if choice.folder is None or choice.folder.name != "step_00000010":
        return f"{choice.folder} was chosen"
    if list(choice.damaged) != [newest.name]:
        return f"reported as {choice.damaged}"
    return problem_with(choice.folder, state_at(10))


def _renew(newest: Path, whole: Path) -> None:
    for path in newest.parent.glob(f"{newest.name}*"):
        shutil.rmtree(path)
    shutil.copytree(whole, newest)


DRILLS = (
    Drill("files of another step, run or world swapped in", swap_files),
    Drill("a checkpoint under the name of another step", swap_folder),
    Drill("files of ranks that are gone", stale_ranks),
    Drill("commits of owners that lost the run", late_owners),
)
