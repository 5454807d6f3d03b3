"""The end that the scheduler has set for this job: known ahead, so that a run leaves with a checkpoint while there is time for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable

from megamm.checkpoint.saver import Committed
from megamm.core.logging import get_logger
from megamm.telemetry.whereabouts import Whereabouts

_log = get_logger("train")
_ANSWER_SECONDS = 10.0
# What a checkpoint is taken to be written at before one was.
_SAVE_BYTES_A_SECOND = 100 << 20


class TimeLimit:
    """Says when another step might not end, with its checkpoint, before the job does.

    One rank of a run holds one: ranks learn of it in the reduction of a step. State: the job's end and what the last save took.

    Args:
        job_id: Of the scheduler.
        ask: Asks the scheduler for the job's end in seconds since the epoch; None where there is none, or no answer.
        margin_seconds: Least time to keep.
        save_bytes: What this rank will write into a checkpoint; the others write as much beside it.
        end: Known already, so that nobody need ask.
    """

    def __init__(
        self, job_id: str, ask: Callable[[], float | None], *, margin_seconds: float, save_bytes: int = 0, end: float | None = None
    ):
        self._job_id, self._ask, self._margin_seconds = job_id, ask, margin_seconds
        self._end = end or ask()
        self._save_seconds = save_bytes / _SAVE_BYTES_A_SECOND
        if self._end is None:
            _log.info("job %s has no end that the scheduler tells", job_id)

    @classmethod
    def of_environment(cls, margin_seconds: float, save_bytes: int) -> TimeLimit | None:
        """The limit of the Slurm job that this process runs in; None outside of one."""
        job_id = os.environ.get("SLURM_JOB_ID", "")
        if not job_id:
            return None
        # In the environment since Slurm 22.05.
        text = os.environ.get("SLURM_JOB_END_TIME", "")
        end = float(text) if text.isdecimal() else None
        return cls(job_id, lambda: slurm_end(job_id), margin_seconds=margin_seconds, save_bytes=save_bytes, end=end)

    def saved(self, outcome: Committed) -> None:
        """A save was measured. It is read back after its commit, which takes as long again at most."""
        self._save_seconds = outcome.stall_seconds + 2 * outcome.commit_seconds

    def reason(self, where: Whereabouts) -> str | None:
        """Why to stop after the step that begins now; None where another one fits behind it.

        Args:
            where: How long steps and evaluations take.
        """
        if self._end is None:
            return None
        needed = max(self._margin_seconds, 2 * where.longest_step_seconds + where.evaluation_seconds + self._save_seconds)
        if time.time() + needed < self._end:
            return None
        # Somebody may have given the job more time since.
        self._end = self._ask() or self._end
        if time.time() + needed < self._end:
            _log.info("job %s was given more time", self._job_id)
            return None
        return f"time limit of job {self._job_id}"


def slurm_end(job_id: str) -> float | None:
    """When Slurm will end a job, in seconds since the epoch; None where it has no limit, or Slurm does not answer."""
    program = shutil.which("squeue")
    if program is None:
        return None
    command = [program, "--noheader", "--format=%e", f"--jobs={job_id}"]
    try:
        # Asked for as a number: dates come in the zone of whoever asks.
        environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = answer.stdout.strip()
    return float(text) if answer.returncode == 0 and text.isdecimal() else None
