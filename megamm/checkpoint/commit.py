"""How a checkpoint comes to exist: written aside, hashed, synced, and committed by its manifest and one rename.

A kill at any moment leaves either no folder of that name or a whole one; what lies in a temporary folder is never read
and is removed by the next save of that step.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamm.checkpoint import random_states
from megamm.checkpoint.manifest import (
    DATA_STATE,
    LEDGER,
    MANIFEST,
    Fence,
    FileFacts,
    Manifest,
    ParameterEntry,
    rank_file,
    software_versions,
    step_folder,
)
from megamm.checkpoint.shards import write_bytes, write_shard
from megamm.core.errors import CheckpointError
from megamm.core.files import canonical_json, sync_folder
from megamm.engine import partitions
from megamm.engine.distributed import World, fail_together, gather_json
from megamm.engine.runtime import Engine


@dataclass(frozen=True, slots=True)
class Progress:
    """What a checkpoint holds beside the engine's state; equal on all ranks, all of it JSON.

    Attributes:
        step: Optimizer steps that were run.
        data_state: What the data plan needs to go on after this step.
        ledger: Skipped samples so far, one table each.
        fingerprints: Name -> digest of what must not change under a resumed run.
    """

    step: int
    data_state: dict[str, Any] = field(default_factory=dict)
    ledger: Sequence[dict[str, Any]] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)


def save(folder: Path, engine: Engine, world: World, progress: Progress) -> Path:
    """Commit a checkpoint; every rank calls it between two steps.

    An older folder of the same step is replaced: it was left behind because it was damaged or its steps were run again.

    Args:
        folder: The run's `checkpoints` folder.
        engine: Between two steps.
        world: The ranks.
        progress: What goes with it.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: A rank could not write (on every rank); nothing was committed, older checkpoints are as they were.
    """
    final = folder / step_folder(progress.step)
    temporary = folder / f".{final.name}.tmp"
    try:
        _write(temporary, final, engine, world, progress)
    except Exception:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def fence_from_environment() -> Fence:
    """The scheduler's job id and restart count; empty outside Slurm."""
    return Fence(os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def _write(temporary: Path, final: Path, engine: Engine, world: World, progress: Progress) -> None:
    with _writing_together(final):
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with _writing_together(final):
        # A network file system may show rank 0's folder late.
        temporary.mkdir(exist_ok=True)
        state = partitions.local_state(engine, rank=world.rank) | random_states.capture(world.device)
        own = write_shard(temporary / rank_file(world.rank), state)
        # The names of the files must be on disk before rank 0 vouches for them.
        sync_folder(temporary)
    shards = [FileFacts(**facts) for facts in gather_json(asdict(own))]
    with _writing_together(final):
        if world.rank == 0:
            _commit(temporary, final, _manifest(temporary, engine, world, progress, shards))


@contextlib.contextmanager
def _writing_together(final: Path) -> Iterator[None]:
    with fail_together():
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"checkpoint {final} was not written: {error}; the older ones are as they were") from error


def _manifest(temporary: Path, engine: Engine, world: World, progress: Progress, shards: list[FileFacts]) -> Manifest:
    files = {rank_file(rank): facts for rank, facts in enumerate(shards)}
    files[DATA_STATE] = write_bytes(temporary / DATA_STATE, canonical_json(progress.data_state).encode())
    files[LEDGER] = write_bytes(temporary / LEDGER, "".join(canonical_json(entry) + "\n" for entry in progress.ledger).encode())
    return Manifest(
        step=progress.step,
        world_size=world.size,
        files=files,
        parameters=tuple(ParameterEntry(**asdict(facts)) for facts in partitions.parameter_table(engine)),
        engine=partitions.counters(engine),
        fingerprints=progress.fingerprints,
        software=software_versions(),
        fence=fence_from_environment(),
    )


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    write_bytes(temporary / MANIFEST, manifest.to_text().encode())
    sync_folder(temporary)
    if final.exists():
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    sync_folder(final.parent)
