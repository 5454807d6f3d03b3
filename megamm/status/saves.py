"""The newest checkpoint of a run: its manifest is read, its bytes are not."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint.manifest import MANIFEST, committed, read_manifest
from megamm.core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint.

    Attributes:
        step: Optimizer steps in it.
        num_bytes: Size of its files.
        num_ranks: Ranks that wrote it.
        age_seconds: Since it was committed, by this machine's clock and the file system's.
    """

    step: int
    num_bytes: int
    num_ranks: int
    age_seconds: float


def newest_saved(run: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint whose manifest holds, and what is wrong with newer ones."""
    damaged = []
    for step, folder in reversed(committed(run / "checkpoints")):
        try:
            manifest = read_manifest(folder)
            at = (folder / MANIFEST).stat().st_mtime
        except (CheckpointError, OSError) as error:
            # One that retention took away while we looked is not damaged.
            if folder.exists():
                damaged.append(str(error))
            continue
        num_bytes = sum(facts.num_bytes for facts in manifest.files.values())
        return Saved(step, num_bytes, manifest.world_size, max(0.0, time.time() - at)), damaged
    return None, damaged
