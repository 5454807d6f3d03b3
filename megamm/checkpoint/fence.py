"""Which owner of a run wrote a checkpoint, and whether a later owner had gone on from before it.

Every owner of a run gets the next number (`lock`). An owner that goes on from step S abandons whatever an earlier owner still
commits beyond S: a rank that a lost node left behind may pass its last check, sleep, and rename its folder hours later.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint.seal import opened
from megamm.core.errors import CheckpointError

LOCK = ".lock"
_OWNER = re.compile(r"(\d{8})\.owner")


@dataclass(frozen=True, slots=True)
class Fence:
    """Who wrote a checkpoint.

    Attributes:
        number: Of the run's owner, from 1; 0 where nobody held the run. A later owner outranks an earlier one.
        job_id: Of the scheduler; empty without one.
        restart_count: How often the scheduler had restarted that job.
    """

    number: int = 0
    job_id: str = ""
    restart_count: int = 0

    @classmethod
    def of_environment(cls, number: int) -> Fence:
        """Owner `number`, with what Slurm says of this process."""
        return cls(number, os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def owner_path(run: Path, number: int) -> Path:
    """The file that makes somebody the run's owner `number`."""
    return run / LOCK / f"{number:08d}.owner"


def newest_owner(run: Path) -> int:
    """Number of the run's newest owner; 0 where there was none."""
    folder = run / LOCK
    if not folder.is_dir():
        return 0
    matches = (_OWNER.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in matches if match), default=0)


def starts(run: Path) -> list[tuple[int, int]]:
    """(number, step) of every owner that went on from a step, as the newest owner knows it."""
    number = newest_owner(run)
    if not number:
        return []
    return [(number, step) for number, step in opened(owner_path(run, number).read_bytes())["starts"]]


def check_fence(folder: Path, fence: Fence, step: int) -> None:
    """Refuse a checkpoint that an owner wrote after it had lost the run.

    Args:
        folder: The checkpoint, in its run. Outside of a run nothing is known and nothing refused.
        fence: What its manifest says.
        step: What its manifest says.

    Raises:
        CheckpointError: A later owner went on from before this step.
    """
    run = folder.parent.parent
    try:
        later = [(number, start) for number, start in starts(run) if number > fence.number and start < step]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run / LOCK} cannot be read ({error}); it says which checkpoints count, restore it or remove it") from error
    if later:
        number, start = later[0]
        raise CheckpointError(
            f"checkpoint {folder} was written by owner {fence.number} of the run (job {fence.job_id or 'without a scheduler'}, restart "
            f"{fence.restart_count}) after owner {number} had gone on from step {start}; use another one"
        )
