"""Which checkpoint to resume from: the newest whose every byte verifies, agreed by all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint.base import Base, folder_digest, weight_files
from megamm.checkpoint.fence import check_fence
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.io import LOCAL, Io
from megamm.checkpoint.manifest import MANIFEST, OtherFormat, aside, check_file, committed, kept_aside, read_manifest, require_digest
from megamm.checkpoint.retain import point_latest
from megamm.core.errors import CheckpointError
from megamm.core.files import digest_file
from megamm.core.logging import get_logger
from megamm.engine.distributed import World, broadcast_json, fail_together, gather_json

_log = get_logger("checkpoint")


@dataclass(frozen=True, slots=True)
class Choice:
    """The newest good checkpoint, and those that were passed over: folder name -> what is wrong with it.

    Where there is no good one, those that were set aside earlier are named as well: a run that had checkpoints must not
    begin anew as if it had none.
    """

    folder: Path | None
    damaged: dict[str, str]


def newest_good(folder: Path, world: World, *, hold: Hold | None = None, before: int | None = None, io: Io = LOCAL) -> Choice:
    """Verify checkpoints from the newest down, the files dealt to the ranks, until one is good; every rank calls it.

    Damaged ones are named in a warning. Whoever holds the run sets them aside (`step_00000100.damaged-1`), where they can be
    looked at and are in nobody's way; where none is good all stay, so that the next start finds the same.

    Args:
        folder: The run's `checkpoints` folder; it need not exist.
        world: The ranks.
        hold: This job's hold of the run; None only looks.
        before: Only checkpoints of earlier steps than this one; None for all.
        io: The file system.

    Raises:
        OtherFormat: One on the way down was written by another version (on every rank).
    """
    names, set_aside = broadcast_json(
        [[path.name for step, path in committed(folder) if before is None or step < before], kept_aside(folder)]
    )
    damaged: dict[str, str] = {}
    for name in reversed(names):
        problem = problem_of(folder / name, world)
        if problem is None:
            if hold is not None and world.is_main:
                _set_aside(folder, list(damaged), hold, io)
                point_latest(folder, name, io)
            return Choice(folder / name, damaged)
        damaged[name] = problem
        if world.is_main:
            _log.warning("passed over: %s", problem)
    return Choice(None, damaged | {name: "it was set aside earlier" for name in set_aside})


def require_good(folder: Path, world: World) -> Path:
    """Insist on one checkpoint; every rank calls it.

    Raises:
        CheckpointError: It is missing or damaged (on every rank).
    """
    problem = problem_of(folder, world)
    if problem is not None:
        raise _on_all_ranks(CheckpointError(problem))
    return folder


def base_at(folder: Path, world: World) -> Base:
    """Read every byte of weights, dealt to the ranks, and say which they are; every rank calls it.

    Args:
        folder: A checkpoint, or an exported folder.
        world: The ranks.

    Raises:
        CheckpointError: They are missing or damaged, or stand on others that are (on every rank).
    """
    path = folder.resolve()
    if (path / MANIFEST).is_file():
        manifest = read_manifest(require_good(path, world))
        if manifest.base is not None:
            require_digest(manifest.base, base_at(Path(manifest.base.path), world).digest)
        return Base(str(path), digest_file(path / MANIFEST), manifest.step)
    with fail_together():
        own = {name: _digest_of_file(path / name) for name in weight_files(path)[world.rank :: world.size]}
    return Base(str(path), folder_digest({name: digest for part in gather_json(own) for name, digest in part.items()}))


def _digest_of_file(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); export the run again") from None


def problem_of(folder: Path, world: World) -> str | None:
    """The first problem that any rank finds, or None for a good checkpoint; every rank calls it.

    Raises:
        OtherFormat: Another version of this package wrote it (on every rank): passing it over would quietly train its steps again.
    """
    problem = None
    try:
        manifest = read_manifest(folder)
        check_fence(folder, manifest.fence, manifest.step)
        for name in sorted(manifest.files)[world.rank :: world.size]:
            check_file(folder, name, manifest.files[name])
    except CheckpointError as error:
        problem = [type(error).__name__, str(error)]
    found = next((report for report in gather_json(problem) if report is not None), None)
    if found is None:
        return None
    name, message = found
    if name == OtherFormat.__name__:
        raise _on_all_ranks(OtherFormat(message))
    return message


def _on_all_ranks(error: CheckpointError) -> CheckpointError:
    error.on_all_ranks = True
    return error


def _set_aside(folder: Path, names: list[str], hold: Hold, io: Io) -> None:
    for name in names:
        hold.check()
        try:
            io.rename(folder / name, aside(folder / name, "damaged"))
        except OSError as error:
            _log.warning("%s keeps its name: %s", folder / name, error)
