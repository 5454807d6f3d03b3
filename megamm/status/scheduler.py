"""What Slurm says of jobs: one question for all of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_SEPARATOR = "\t"
_FIELDS = ("%i", "%T", "%r", "%N", "%D", "%S", "%e")
_TIMEOUT_SECONDS = 20.0
WAITING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
LIVE_STATES = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the scheduler sees it.

    Attributes:
        id: Its number.
        state: In Slurm's words, such as `PENDING`.
        reason: Why it waits, or how it ended; empty where there is nothing to say.
        nodes: Slurm's list of its nodes, such as `gpu[01-16]`; empty while it waits.
        num_nodes: How many nodes it has or wants.
        starts_at: When it started or is expected to; empty where Slurm does not know.
        ends_at: When its time limit ends it.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    num_nodes: int = 0
    starts_at: str = ""
    ends_at: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it is still to run, for the first time or again."""
        return self.state in WAITING_STATES

    @property
    def is_live(self) -> bool:
        """Whether a process of it may be running."""
        return self.state in LIVE_STATES


def jobs(ids: Iterable[str]) -> dict[str, Job] | None:
    """Job number -> job, of those that Slurm still knows; None where there is no Slurm, or it does not answer."""
    wanted = sorted({number for number in ids if number.isdecimal()}, key=int)
    program = shutil.which("squeue")
    if program is None or not wanted:
        return None if program is None else {}
    command = [program, "--noheader", "--states=all", f"--format={_SEPARATOR.join(_FIELDS)}", f"--jobs={','.join(wanted)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0:
        # Asked for a single job that it has forgotten, Slurm calls that an error.
        return {} if "Invalid job id" in answer.stderr else None
    found = [_job(line.split(_SEPARATOR)) for line in answer.stdout.splitlines() if line.count(_SEPARATOR) == len(_FIELDS) - 1]
    return {job.id: job for job in found}


def _job(cells: list[str]) -> Job:
    number, state, reason, nodes, num_nodes, starts_at, ends_at = (cell.strip() for cell in cells)
    known = [text if text not in ("N/A", "None", "(null)", "Unknown") else "" for text in (reason, nodes, starts_at, ends_at)]
    return Job(number, state, known[0], known[1], int(num_nodes) if num_nodes.isdecimal() else 0, known[2], known[3])
