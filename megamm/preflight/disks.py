"""How fast nodes write: what several of them share is written by one after the other, a disk of a node's own by all at once.

Side by side each node would measure its share of a common disk, and the more nodes there are the further every one would fall below the
floor.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError, MegaMMError
from megamm.preflight.meeting import Meeting

NAMES = ("scratch_disk", "run_disk")
_BLOCK_BYTES = 4 << 20
_TURN_SECONDS = 1.0
_MAX_TURNS = 64


def folders_of(run: Path) -> dict[str, Path]:
    """Where this node is to write, by the names of disks: the nearest folder of the run's that there is, and that of temporary files."""
    nearest = run.absolute()
    # Not `exists`, which raises for a mount that went stale.
    while not os.access(nearest, os.F_OK):
        nearest = nearest.parent
    return {"scratch_disk": scratch_folder(), "run_disk": nearest}


def scratch_folder() -> Path:
    """The folder of temporary files: MEGAMM_SCRATCH, as TMPDIR; not what Python takes where that cannot be written."""
    return Path(os.environ.get("MEGAMM_SCRATCH") or os.environ.get("TMPDIR") or tempfile.gettempdir())


def check_writable(name: str, folder: Path) -> None:
    """Refuse what cannot be written, in the words of who set it.

    Raises:
        ConfigError: It is no folder, or not writable.
    """
    if name == "scratch_disk" and os.environ.get("MEGAMM_SCRATCH"):
        said, fix = f"MEGAMM_SCRATCH={folder}", "make it on every node, or name another folder in the site's settings"
    else:
        said, fix = f"{folder}", "check its mount and its owner"
    if not folder.is_dir():
        raise ConfigError(f"{said} is no folder; {fix}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{said} cannot be written; {fix}")


def sign(folder: Path, token: str, node: str) -> str:
    """The first node that signed in `folder`: nodes that say the same one share it, whatever it is called there.

    Args:
        folder: Exists; `forget` removes the sign.
        token: Of this start, so that no other one's sign is read.
        node: Who signs if nobody has.
    """
    common, own = _sign_path(folder, token), _sign_path(folder, f"{token}-{node}")
    own.write_text(node)
    try:
        # A link appears with its content; a new file would be empty for a moment.
        os.link(own, common)
    except FileExistsError:
        pass
    finally:
        own.unlink()
    return common.read_text()


def forget(folder: Path, token: str) -> None:
    """Remove what `sign` left."""
    _sign_path(folder, token).unlink(missing_ok=True)


def plan_turns(shared: Mapping[int, Mapping[str, str]]) -> list[tuple[str, list[int]]]:
    """Who writes which disk when: turns of (disk, ranks); of those that share one only one rank, as long as there are not too many.

    Args:
        shared: Rank -> disk -> who signed there first; one rank a node.
    """
    turns = []
    for name in NAMES:
        groups: dict[str, list[int]] = {}
        for rank, signed in sorted(shared.items()):
            if name in signed:
                groups.setdefault(signed[name], []).append(rank)
        longest = max(map(len, groups.values()), default=0)
        # Thousands of turns would take longer than what a few nodes at once cost each other.
        width = -(-longest // _MAX_TURNS) or 1
        for start in range(0, longest, width):
            turns.append((name, [rank for group in groups.values() for rank in group[start : start + width]]))
    return turns


def measure_disks(meeting: Meeting, shared: Mapping[int, Mapping[str, str]], measure: Callable[[str], Any]) -> dict[int, dict[str, Any]]:
    """Do this task's part of all turns.

    Args:
        meeting: Every task of the job that is at work calls this.
        shared: As `plan_turns` takes it; only rank 0 knows it.
        measure: Gives what is to be said of a disk, by its name.

    Returns:
        On rank 0: rank -> disk -> what was said, without those that did not answer.

    Raises:
        Unreachable: The first node does not go on.
    """
    rank = meeting.info.rank
    if rank == 0:
        meeting.put("turns", plan_turns(shared))
    found: dict[int, dict[str, Any]] = {}
    for number, (name, ranks) in enumerate(meeting.follow("turns")):
        if rank == 0:
            meeting.put(f"turn/{number}", True)
        if rank in ranks:
            meeting.follow(f"turn/{number}")
            meeting.post(name, measure(name))
        if rank == 0:
            for one, said in meeting.gather(name, ranks).items():
                found.setdefault(one, {})[name] = said
    return found


def disk(folder: Path, num_bytes: int, at_work: Callable[[], None]) -> dict[str, float]:
    """Free space in GiB, and the speed of writing and syncing blocks of a file in MiB a second.

    Args:
        folder: Where the file is, without a name.
        num_bytes: Size of the file; a slow disk gets less of it, so that no turn is long.
        at_work: Called after each block.
    """
    num_left, speeds, end = num_bytes, [], time.monotonic() + _TURN_SECONDS
    block = os.urandom(min(_BLOCK_BYTES, num_bytes))
    with tempfile.TemporaryFile(dir=folder) as file:
        while num_left > 0 and (not speeds or time.monotonic() < end):
            start = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speeds.append(len(block) / (time.perf_counter() - start))
            num_left -= len(block)
            at_work()
    usage = shutil.disk_usage(folder)
    return {"free_gib": round(usage.free / 2**30, 1), "write_mib_per_second": round(statistics.median(speeds) / 2**20, 1)}


def tried(problems: list[str], what: str, measure: Callable[..., Any], *arguments: Any) -> Any:
    """What a measurement gives; where it fails that is one more problem of this node."""
    try:
        return measure(*arguments)
    except (OSError, RuntimeError, MegaMMError) as error:
        text = str(error).strip().partition("\n")[0]
        problems.append(f"{what}: {text}" if what else text)
        return None


def _sign_path(folder: Path, name: str) -> Path:
    return folder / f".megamm-preflight-{name}"
