"""Everything that a run's folder says, each part read by itself: what cannot be read becomes a note, and the rest is still told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megamm.checkpoint.fence import LOCK
from megamm.core.errors import MegaMMError
from megamm.core.files import read_json
from megamm.status.liveness import Owning, read_owning
from megamm.status.progress import Progress, read_progress
from megamm.status.saves import Saved, newest_saved
from megamm.status.submissions import FILE, FOLDER, Submission, read_submissions
from megamm.telemetry.failures import last_failure
from megamm.telemetry.heartbeat import Beat, read_beats
from megamm.train.run_folder import RunFolder

Value = TypeVar("Value")
# What has a config.json as well: the snapshot of a submission, and an exported folder.
_MARKS_OF_OTHERS = (FILE, "parity.json")


@dataclass
class Facts:
    """A run as its files show it at one moment; they may change while they are read, so no two parts need agree.

    Attributes:
        run: The run folder.
        recipe: Its archived recipe as plain values; empty where none was archived yet.
        done: What DONE holds; None where it is not there.
        interrupted: What INTERRUPTED holds; None where it is not there.
        owning: Its newest owner.
        progress: Of the metrics.
        saved: The newest checkpoint.
        beats: What the ranks of the newest owner said last.
        failure: What ended the newest start that failed: the cause rather than its echo on other ranks.
        submissions: Oldest first.
        num_ranks: Of the last start, 0 where that is not known.
        notes: What cannot be read, and what is wrong with it.
    """

    run: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] | None = None
    interrupted: dict[str, Any] | None = None
    owning: Owning | None = None
    progress: Progress = field(default_factory=Progress)
    saved: Saved | None = None
    beats: list[Beat] = field(default_factory=list)
    failure: dict[str, Any] | None = None
    submissions: list[Submission] = field(default_factory=list)
    num_ranks: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def job_ids(self) -> list[str]:
        """Jobs that may be at work on it: of its owner and of the newest submission."""
        ids = [self.owning.owner.job_id] if self.owning else []
        ids += [one.job_id for one in self.submissions[-1:]]
        return [number for number in dict.fromkeys(ids) if number]


def is_run(folder: Path) -> bool:
    """Whether a run was started, is starting, or was submitted in this folder."""
    has_recipe = (folder / "config.json").is_file() and not any((folder / name).is_file() for name in _MARKS_OF_OTHERS)
    return has_recipe or (folder / FOLDER).is_dir() or (folder / LOCK).is_dir()


def read_facts(run: Path) -> Facts:
    """Read a run's folder."""
    facts, folder = Facts(run), RunFolder(run)

    def part(name: str, read: Callable[[], Value], missing: Value) -> Value:
        try:
            return read()
        except MegaMMError as error:
            facts.notes.append(str(error))
        except OSError as error:
            facts.notes.append(f"{name} cannot be read: {error.strerror or error}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # A file of this name that is something else: no reason to say nothing of the run.
            facts.notes.append(f"{name} is not as expected: {type(error).__name__}: {error}")
        return missing

    if part("the folder", lambda: list(run.iterdir()), None) is None:
        return facts
    facts.recipe = part("config.json", lambda: _table(folder.config), None) or {}
    # The owner first: a marker that comes meanwhile is then believed, one that goes meanwhile is not.
    facts.owning = part(".lock", lambda: read_owning(run), None)
    facts.done = part("DONE", lambda: _table(folder.done), None)
    facts.interrupted = part("INTERRUPTED", lambda: _table(folder.interrupted), None)
    began = facts.owning.began_at_step if facts.owning else 0
    facts.progress = part("metrics.jsonl", lambda: read_progress(run, began_at_step=began), Progress())
    facts.saved, damaged = part("checkpoints", lambda: newest_saved(run), (None, []))
    facts.notes += damaged
    facts.beats = part("heartbeats", lambda: _beats(run, facts), [])
    facts.failure = part("errors", lambda: last_failure(run), None)
    facts.submissions = part(FOLDER, lambda: read_submissions(run), [])
    facts.num_ranks = part("environment.json", lambda: _num_ranks(run, facts), 0)
    return facts


def _table(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file, an empty one where it is half written."""
    try:
        table = read_json(path)
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return {}
    return table if isinstance(table, dict) else {}


def _beats(run: Path, facts: Facts) -> list[Beat]:
    return read_beats(run, facts.owning.number) if facts.owning else []


def _num_ranks(run: Path, facts: Facts) -> int:
    if facts.beats:
        return len(facts.beats)
    launcher = (_table(run / "environment.json") or {}).get("launcher", {})
    return int(launcher.get("WORLD_SIZE", 1 if facts.recipe else 0))
