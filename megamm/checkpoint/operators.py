"""What people ask of a run's checkpoints: list, show, prune. Nothing here needs ranks or an engine."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.checkpoint.lock import RunLock
from megamm.checkpoint.manifest import MANIFEST, committed, kept_aside, read_data_state, read_ledger, read_manifest, verify
from megamm.checkpoint.retain import point_latest, retire
from megamm.config.schema import Checkpointing
from megamm.core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a listing.

    Attributes:
        name: Of the folder.
        step: Optimizer steps; None for what was set aside.
        world_size: Ranks that wrote it; 0 where the manifest cannot be read.
        num_bytes: Size of its files.
        committed_at: Local time of the manifest.
        problem: What is wrong with it, as far as was looked; empty for nothing.
    """

    name: str
    step: int | None
    world_size: int
    num_bytes: int
    committed_at: str
    problem: str


def entries(folder: Path, *, verified: bool = False) -> list[Entry]:
    """All checkpoints of a `checkpoints` folder, oldest first, then what was set aside.

    Args:
        folder: The run's `checkpoints` folder.
        verified: Read every byte; without it only the manifests.

    Raises:
        CheckpointError: There is no such run.
    """
    if not folder.parent.is_dir():
        raise CheckpointError(f"{folder.parent} does not exist; name a run folder")
    found = [_entry(path, step, verified=verified) for step, path in committed(folder)]
    return found + [_entry(folder / name, None, verified=False) for name in kept_aside(folder)]


def listing(found: list[Entry], *, verified: bool = False) -> list[str]:
    """A line an entry, for a terminal; `verified` as the entries were made."""
    good = "verified" if verified else "committed"
    return [
        f"{entry.name:<32} {ranks(entry.world_size):>11} {entry.num_bytes >> 20:>9,} MiB  {entry.committed_at}  {entry.problem or good}"
        for entry in found
    ] or ["no checkpoints"]


def ranks(number: int) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} rank{'' if number == 1 else 's'}"


def describe(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest, data state and ledger say, as JSON.

    Raises:
        CheckpointError: The manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    sizes = {name: sum(math.prod(one.shape) for one in manifest.parameters if one.kind in kinds) for name, kinds in _KINDS.items()}
    return {
        "step": manifest.step,
        "num_tokens": manifest.num_tokens,
        "world_size": manifest.world_size,
        "num_bytes": sum(facts.num_bytes for facts in manifest.files.values()),
        "num_parameters": sizes,
        "base": None if manifest.base is None else dataclasses.asdict(manifest.base),
        "engine": manifest.engine,
        "fingerprints": manifest.fingerprints,
        "software": manifest.software,
        "owner": {"number": manifest.fence.number, "job_id": manifest.fence.job_id, "restart_count": manifest.fence.restart_count},
        "num_skipped_samples": len(read_ledger(folder)),
        "data_state": read_data_state(folder),
    }


def prune(run: Path, settings: Checkpointing, *, set_aside: bool = False) -> list[str]:
    """Delete what the settings do not keep, once the newest checkpoint was read back; owns the run while it works.

    Args:
        run: The run folder.
        settings: How many and which stay.
        set_aside: Delete damaged and stale ones as well.

    Returns:
        Names of the deleted folders.

    Raises:
        CheckpointError: A job uses the run, or its newest checkpoint is damaged.
    """
    folder = run / "checkpoints"
    # Before anything is written: what is no run stays as it is.
    _newest(folder)
    lock = RunLock.acquire(run, lease_seconds=settings.lease_seconds)
    try:
        # Again: only now does nobody else change the folder.
        step, newest = _newest(folder)
        verify(newest)
        point_latest(folder, newest.name)
        deleted = retire(folder, step, settings)
        for name in kept_aside(folder) if set_aside else []:
            shutil.rmtree(folder / name)
            deleted.append(name)
    except OSError as error:
        raise CheckpointError(f"{folder} was pruned in part: {error}") from error
    finally:
        lock.release()
    return deleted


def _newest(folder: Path) -> tuple[int, Path]:
    found = committed(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint; nothing was deleted")
    return found[-1]


_KINDS = {"trainable": ("trainable", "followed"), "frozen": ("frozen",), "buffer": ("buffer",), "base": ("base",)}


def _entry(path: Path, step: int | None, *, verified: bool) -> Entry:
    problem = ""
    world_size = num_bytes = 0
    try:
        manifest = verify(path) if verified else read_manifest(path)
        world_size, num_bytes = manifest.world_size, sum(facts.num_bytes for facts in manifest.files.values())
    except CheckpointError as error:
        problem = str(error)
    place = path / MANIFEST
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(place.stat().st_mtime)) if place.is_file() else ""
    return Entry(path.name, step, world_size, num_bytes, at, problem)
