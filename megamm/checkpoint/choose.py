"""Which checkpoint to resume from: the newest whose every byte verifies, agreed by all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint.manifest import check_file, committed, read_manifest
from megamm.core.errors import CheckpointError
from megamm.core.logging import get_logger
from megamm.engine.distributed import World, broadcast_json, gather_json

_log = get_logger("checkpoint")


@dataclass(frozen=True, slots=True)
class Choice:
    """The newest good checkpoint, and those that were passed over: folder name -> what is wrong with it."""

    folder: Path | None
    damaged: dict[str, str]


def newest_good(folder: Path, world: World) -> Choice:
    """Verify checkpoints from the newest down, the files dealt to the ranks, until one is good; every rank calls it.

    Damaged ones are named in a warning and left in place.

    Args:
        folder: The run's `checkpoints` folder; it need not exist.
        world: The ranks.
    """
    names = broadcast_json([path.name for _, path in committed(folder)])
    damaged: dict[str, str] = {}
    for name in reversed(names):
        problem = problem_of(folder / name, world)
        if problem is None:
            return Choice(folder / name, damaged)
        damaged[name] = problem
        if world.rank == 0:
            _log.warning("passed over: %s", problem)
    return Choice(None, damaged)


def require_good(folder: Path, world: World) -> Path:
    """Insist on one checkpoint; every rank calls it.

    Raises:
        CheckpointError: It is missing or damaged (on every rank).
    """
    problem = problem_of(folder, world)
    if problem is not None:
        error = CheckpointError(problem)
        error.on_all_ranks = True
        raise error
    return folder


def problem_of(folder: Path, world: World) -> str | None:
    """The first problem that any rank finds, or None for a good checkpoint; every rank calls it."""
    problem = None
    try:
        manifest = read_manifest(folder)
        for name in sorted(manifest.files)[world.rank :: world.size]:
            check_file(folder, name, manifest.files[name])
    except CheckpointError as error:
        problem = str(error)
    return next((report for report in gather_json(problem) if report is not None), None)
