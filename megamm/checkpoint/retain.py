"""Which checkpoints stay: only what a later, verified one replaces is deleted."""

from __future__ import annotations

from pathlib import Path

from megamm.checkpoint.commit import remove
from megamm.checkpoint.io import LOCAL, Io
from megamm.checkpoint.manifest import committed
from megamm.config.schema import Checkpointing
from megamm.core.logging import get_logger

_log = get_logger("checkpoint")
LATEST = "latest"


def retire(folder: Path, verified: int, settings: Checkpointing, io: Io = LOCAL) -> list[str]:
    """Delete what `keep_last` and `keep_every` do not keep of the checkpoints up to one that was verified.

    One process calls it. What cannot be deleted stays, with a warning: that is no reason to end a run.

    Args:
        folder: The run's `checkpoints` folder.
        verified: Step of a checkpoint that was read back from the disk; it stays, and so does everything later.
        settings: How many and which stay.
        io: The file system.

    Returns:
        Names of those that are no checkpoints any more.
    """
    found = {step: path for step, path in committed(folder) if step <= verified}
    if verified not in found:
        return []
    renamed = {}
    for path in (found[step] for step in superseded(list(found), settings)):
        # Renamed first: a deletion that is cut short must not look like a damaged checkpoint.
        hidden = path.with_name(f".{path.name}.deleted")
        remove(hidden, io)
        try:
            io.rename(path, hidden)
        except OSError as error:
            _log.warning("%s is superseded and stays for now: %s", path, error)
        else:
            renamed[path.name] = hidden
    try:
        io.sync_folder(folder)
    except OSError as error:
        # Whether the new names outlive a power cut is unknown, so nothing may be missing behind them: the next sweep deletes.
        _log.warning("%s keep their bytes for now: %s", ", ".join(map(str, renamed.values())) or folder, error)
    else:
        for hidden in renamed.values():
            remove(hidden, io)
    return list(renamed)


def point_latest(folder: Path, name: str, io: Io = LOCAL) -> None:
    """Let `latest` lead people to a checkpoint that was verified. No program reads it, so that it may be missing or old."""
    try:
        io.point(folder / LATEST, name)
    except OSError as error:
        _log.warning("%s was not renewed: %s", folder / LATEST, error)


def superseded(steps: list[int], settings: Checkpointing) -> list[int]:
    """Steps, of ascending `steps`, that neither `keep_last` nor `keep_every` keeps."""
    candidates = steps[: -settings.keep_last]
    return [step for step in candidates if not settings.keep_every or step % settings.keep_every]
