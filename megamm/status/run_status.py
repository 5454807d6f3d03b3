"""The status of runs: their folders' facts, the scheduler's answer, and what follows from both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError
from megamm.status.facts import Facts, is_run, read_facts
from megamm.status.scheduler import Job, jobs
from megamm.status.state import Jobs, silent_ranks, state_of

# Most of the time of a read goes into waiting for a shared file system.
_NUM_READERS = 16
_MAX_DEPTH = 3
_UNDER_WAY = ("running", "starting", "stalled")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How a run is doing.

    Attributes:
        facts: What its folder says.
        state: One of `state.STATES`.
        why: One line on the state.
        jobs: Its jobs that the scheduler knows.
        notes: What a person should look at.
    """

    facts: Facts
    state: str
    why: str
    jobs: tuple[Job, ...]
    notes: tuple[str, ...]

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run; None where its recipe cannot be read."""
        return self.facts.recipe.get("train", {}).get("steps")

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the last steps, while it is under way."""
        pace = self.facts.progress.seconds_a_step
        if self.state not in _UNDER_WAY or pace is None or self.num_steps is None:
            return None
        return max(0, self.num_steps - self.facts.progress.step) * pace

    @property
    def num_skipped(self) -> int:
        """Samples skipped over the whole run."""
        return sum(self.facts.progress.num_skipped.values())

    def to_json(self) -> dict[str, Any]:
        """Everything that a program may want to know, as plain JSON values."""
        facts, owning = self.facts, self.facts.owning
        return {
            "run": str(facts.run),
            "state": self.state,
            "why": self.why,
            "recipe": facts.recipe.get("name"),
            "num_steps": self.num_steps,
            **asdict(facts.progress),
            "seconds_left": self.seconds_left,
            "num_ranks": facts.num_ranks,
            "num_restarts": owning.num_restarts if owning else 0,
            "owner": None if owning is None else {**asdict(owning.owner), "silent_seconds": owning.silent_seconds},
            "jobs": [asdict(job) for job in self.jobs],
            "checkpoint": None if facts.saved is None else asdict(facts.saved),
            "interrupted": facts.interrupted,
            "last_error": facts.failure,
            "ranks": [asdict(beat) for beat in facts.beats],
            "notes": list(self.notes),
        }


def read_status(runs: Sequence[Path]) -> list[RunStatus]:
    """Status of runs, in their order; folders are read at once, and the scheduler is asked once."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        found = list(pool.map(read_facts, runs))
    unfinished = [facts for facts in found if facts.done is None]
    known = jobs(number for facts in unfinished for number in facts.job_ids)
    return [_status(facts, known) for facts in found]


def find_runs(folder: Path) -> list[Path]:
    """The run that a folder is, or the runs below it, by name; a folder that cannot be read counts as one, to be told.

    Raises:
        ConfigError: It does not exist, is a file, or there is no run.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}; name a run folder, or a folder of runs")
    if not (found := sorted(_runs_below(folder, _MAX_DEPTH))):
        raise ConfigError(f"{folder} holds no run; name a run folder that `megamm pretrain` wrote, or a folder of runs")
    return found


def _runs_below(folder: Path, depth: int) -> list[Path]:
    try:
        if is_run(folder):
            return [folder]
        inside = [Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        # Gone since it was listed.
        return []
    except OSError:
        return [folder]
    return [run for one in inside for run in _runs_below(one, depth - 1)] if depth else []


def _status(facts: Facts, known: Jobs) -> RunStatus:
    state, why = state_of(facts, known)
    notes = list(facts.notes) if state != "unreadable" else []
    if state in _UNDER_WAY:
        notes += silent_ranks(facts)
    if facts.progress.num_failed_saves:
        notes.append(f"saves that failed in a row: {facts.progress.num_failed_saves}; see {facts.run}/logs")
    own = tuple(known[number] for number in facts.job_ids if number in known) if known else ()
    return RunStatus(facts, state, why, own, tuple(notes))
