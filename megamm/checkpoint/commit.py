"""How a checkpoint comes to exist: written aside, hashed, synced, and committed by its manifest and one rename.

Nothing here is a collective: each function is what one rank does with files. A kill at any moment leaves either no folder of
that name or a whole one. Temporary folders are never read, and carry the owner's number and the attempt in their names:

    .step_00000100.7-3.tmp      the third attempt to save of the run's seventh owner

so nobody writes into another's, and what may be swept away is told by name alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamm.checkpoint.fence import Fence
from megamm.checkpoint.io import Buffer, Io
from megamm.checkpoint.lock import LostRun
from megamm.checkpoint.manifest import MANIFEST, FileFacts, Manifest, aside, read_manifest, step_folder
from megamm.checkpoint.shards import write_file
from megamm.core.errors import CheckpointError
from megamm.core.logging import get_logger

_log = get_logger("checkpoint")
_TEMPORARY = re.compile(r"\.step_\d{8,}\.(\d+)-(\d+)\.tmp")
_DELETED = re.compile(r"\.step_\d{8,}\.deleted")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a checkpoint holds beside the engine's state; equal on all ranks, all of it JSON.

    Attributes:
        step: Optimizer steps that were run.
        data_state: What the data plan needs to go on after this step.
        ledger: Skipped samples so far, one table each.
        fingerprints: Name -> digest of what the run was made with.
        num_tokens: Real tokens that were trained on so far.
    """

    step: int
    data_state: dict[str, Any] = field(default_factory=dict)
    ledger: Sequence[dict[str, Any]] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to commit one step.

    Attributes:
        folder: The run's `checkpoints` folder.
        step: What is saved.
        fence: Who saves.
        number: How many attempts this owner has made with this one.
    """

    folder: Path
    step: int
    fence: Fence
    number: int

    @property
    def temporary(self) -> Path:
        """Where it is written."""
        return self.folder / f".{step_folder(self.step)}.{self.fence.number}-{self.number}.tmp"

    @property
    def final(self) -> Path:
        """What it is once committed."""
        return self.folder / step_folder(self.step)


def write_files(attempt: Attempt, files: Mapping[str, Iterable[Buffer]], io: Io) -> dict[str, FileFacts]:
    """Write this rank's files (name -> blocks) and make their names durable, before anybody vouches for them."""
    io.make_folder(attempt.temporary)
    facts = {name: write_file(attempt.temporary / name, blocks, io) for name, blocks in files.items()}
    io.sync_folder(attempt.temporary)
    return facts


def commit(attempt: Attempt, manifest: Manifest, io: Io, check_owner: Callable[[], None]) -> FileFacts:
    """Write the manifest and rename the folder; every file it names is on the disk already.

    Args:
        attempt: Written by all ranks.
        manifest: Of all their files.
        io: The file system.
        check_owner: Raises where this process is no longer the run's owner.

    Returns:
        Size and digest of the manifest, to be read back with the rest.

    Raises:
        LostRun: A later owner has committed this step already.
    """
    facts = write_file(attempt.temporary / MANIFEST, [manifest.to_text().encode()], io)
    io.sync_folder(attempt.temporary)
    # As late as can be. An owner that sleeps between this line and the rename is caught by its fence when somebody reads.
    check_owner()
    if attempt.final.exists():
        _require_not_later(attempt)
        # Of an abandoned past of the run: the owner went on from before it. Kept, because nobody said that it is bad.
        io.rename(attempt.final, aside(attempt.final, "stale"))
    io.rename(attempt.temporary, attempt.final)
    io.sync_folder(attempt.folder)
    return facts


def _require_not_later(attempt: Attempt) -> None:
    """An owner that slept since its last check must not push aside what the next one has committed in the meantime."""
    try:
        fence = read_manifest(attempt.final).fence
    except CheckpointError:
        return
    if fence.number > attempt.fence.number:
        raise LostRun(f"{attempt.final} was committed by owner {fence.number} of the run; owner {attempt.fence.number} must not write it")


def sweep(attempt: Attempt, io: Io) -> None:
    """Delete what can never be committed any more: temporary folders of earlier attempts and owners, and deletions cut short."""
    if not attempt.folder.is_dir():
        return
    for path in sorted(attempt.folder.glob(".step_*")):
        match = _TEMPORARY.fullmatch(path.name)
        earlier = match is not None and (int(match[1]), int(match[2])) < (attempt.fence.number, attempt.number)
        if earlier or _DELETED.fullmatch(path.name):
            remove(path, io)


def remove(path: Path, io: Io) -> None:
    """Delete a folder that nobody reads; where that fails it stays for the next `sweep`."""
    try:
        if path.exists():
            io.remove_folder(path)
    except OSError as error:
        _log.warning("%s stays for now: %s", path, error)
