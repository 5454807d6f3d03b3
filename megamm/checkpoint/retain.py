"""Which checkpoints stay: only what a later, verified one replaces is deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

from megamm.checkpoint.choose import problem_of
from megamm.checkpoint.manifest import committed
from megamm.config.schema import Checkpointing
from megamm.core.files import sync_folder
from megamm.core.logging import get_logger
from megamm.engine.distributed import World, broadcast_json, fail_together

_log = get_logger("checkpoint")


def retain(folder: Path, settings: Checkpointing, world: World) -> list[str]:
    """Delete what `keep_last` and `keep_every` do not keep; every rank calls it.

    Nothing is deleted unless the newest checkpoint verifies now, from disk. A damaged one never counts as kept.

    Args:
        folder: The run's `checkpoints` folder.
        settings: How many and which stay.
        world: The ranks.

    Returns:
        Names of the deleted folders.
    """
    # Rank 0's listing only: on a network file system the other ranks may not see the newest folder yet.
    listing = broadcast_json([[step, path.name] for step, path in committed(folder)])
    names: dict[int, str] = dict(listing)
    surplus = superseded(list(names), settings)
    if not surplus:
        return []
    if problem := problem_of(folder / names[max(names)], world):
        if world.rank == 0:
            _log.warning("no checkpoint is deleted: %s", problem)
        return []
    deleted = [names[step] for step in surplus]
    with fail_together():
        if world.rank == 0:
            _delete(folder, deleted)
    return deleted


def superseded(steps: list[int], settings: Checkpointing) -> list[int]:
    """Steps, of ascending `steps`, that neither `keep_last` nor `keep_every` keeps."""
    candidates = steps[: -settings.keep_last]
    return [step for step in candidates if not settings.keep_every or step % settings.keep_every]


def _delete(folder: Path, names: list[str]) -> None:
    _sweep(folder)
    # Renamed first: a deletion that is cut short must not look like a damaged checkpoint. The next one finishes it.
    for name in names:
        (folder / name).rename(folder / f".{name}.deleted")
    sync_folder(folder)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    for doomed in [*folder.glob(".step_*.deleted"), *folder.glob(".step_*.replaced")]:
        shutil.rmtree(doomed)
