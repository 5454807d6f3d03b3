"""Run folders made by the code that a run writes them with, without training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megamm.checkpoint.lock import RunLock
from megamm.config import load_recipe, to_dict
from megamm.core.files import write_json

_DIES = """
import os, sys
from pathlib import Path
from megamm.checkpoint.lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]), lease_seconds=60.0)
lock.started_at(int(sys.argv[2]))
os._exit(9)
"""


def metrics_line(step: int, **values: object) -> str:
    """A line as a step writes it."""
    line = {
        "step": step,
        "unix_seconds": 1e9 + 2.0 * step,
        "loss": 3.0,
        "tokens": 100,
        "tokens_total": 100 * step,
        "seconds": 0.5,
        "skipped_samples": 0,
    }
    return json.dumps({**line, **values}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 2000 steps of which nobody is the owner."""
    folder = tmp_path / "runs" / "one"
    write_json(folder / "config.json", to_dict(load_recipe("tiny", ["--train.steps=2000"])))
    write_json(folder / "environment.json", {"launcher": {"WORLD_SIZE": "4"}})
    return folder


@pytest.fixture
def owned(run: Path) -> Iterator[RunLock]:
    """The run's owner, this process, which went on from step 0; released at the end."""
    lock = RunLock.acquire(run, lease_seconds=60.0)
    lock.started_at(0)
    yield lock
    lock.release()


@pytest.fixture
def die() -> Callable[[Path, int], None]:
    """Own a run from a step on, in a process that dies of it."""

    def owner_dies(run: Path, step: int) -> None:
        subprocess.run([sys.executable, "-c", _DIES, str(run), str(step)], check=False, timeout=60)

    return owner_dies
