"""What was handed to the scheduler for a run: `RUN/submissions/0001/submission.json`, one folder a submission."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megamm.core.files import read_json

FOLDER = "submissions"
FILE = "submission.json"


@dataclass(frozen=True, slots=True)
class Submission:
    """One `megamm submit`.

    Attributes:
        target: Where to, such as `slurm`.
        job_id: What the scheduler called it; empty where it never answered.
        submitted_at: Local time, for people.
        submitted_by: User name.
        command: The scheduler's command line, word by word.
        environment: Variables that were set for it.
        num_nodes: Nodes asked for.
        num_ranks: Ranks on all of them.
        commit: Git commit of the code; empty where the code is under no version control.
        is_modified: Whether the code differed from that commit (`code.patch` says how).
    """

    target: str
    job_id: str
    submitted_at: str
    submitted_by: str
    command: list[str]
    environment: dict[str, str]
    num_nodes: int
    num_ranks: int
    commit: str
    is_modified: bool


def read_submissions(run: Path) -> list[Submission]:
    """All submissions of a run, oldest first; those whose record is not whole are left out."""
    folder = run / FOLDER
    found = [_read(path / FILE) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return [one for one in found if one is not None]


def _read(path: Path) -> Submission | None:
    try:
        table: Any = read_json(path)
        return Submission(**{field.name: table[field.name] for field in fields(Submission)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
