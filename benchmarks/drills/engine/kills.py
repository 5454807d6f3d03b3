"""SIGKILL of a rank at the operations of a save behind training, under the real engine; then the ordinary command goes on."""

from __future__ import annotations

import functools
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.engine.attempts import count
from benchmarks.drills.engine.equality import Unbroken, left_in
from benchmarks.drills.engine.ground import NUM_RANKS, Ground, end_in_order
from megamm.checkpoint.manifest import committed, step_folder, verify
from megamm.core.json_lines import read_json_lines

_STEPS, _EVERY = 8, 2
_SAVED = 4
"""The save that is killed: the second one, which replaces a checkpoint that is there."""
_RECIPE = (f"--train.steps={_STEPS}", f"--checkpoint.every={_EVERY}", "--checkpoint.keep_last=1")
_TRIES: dict[Size, int] = {"quick": 3, "normal": 20, "full": 80}
_LAUNCHED: dict[Size, int] = {"quick": 0, "normal": 4, "full": 8}
"""How many of them go on through the launcher, and the rest through the same command on forked ranks."""


def kills(size: Size, folder: Path) -> Tally:
    """Kill at boundaries of one save that are spread over its operations and both ranks."""
    with Ground(folder, *_RECIPE) as ground:
        unbroken = Unbroken.train(ground)
        boundaries = _boundaries(ground)
        chosen = random.Random(4).sample(boundaries, min(_TRIES[size], len(boundaries)))
        every = max(1, len(chosen) // max(1, _LAUNCHED[size]))
        attempts = [
            functools.partial(_kill, ground, unbroken, boundary, launched=_LAUNCHED[size] > 0 and number % every == 0)
            for number, boundary in enumerate(chosen)
        ]
        return count(attempts, f"of {len(boundaries)} boundaries of a save on {NUM_RANKS} ranks; bit-equal at the end")


def _boundaries(ground: Ground) -> list[dict[str, Any]]:
    """Every moment around every operation of the save, on each rank."""
    notes = ground.folder / "notes"
    ground.train("noted", fault={"name": "noted", "folder": str(notes)})
    boundaries = []
    for rank, path in enumerate(sorted(notes.iterdir())):
        operations = read_json_lines(path)
        first = next(one["number"] for one in operations if step_folder(_SAVED) in one["path"])
        last = next(one["number"] for one in operations if step_folder(_SAVED + _EVERY) in one["path"])
        for one in operations[first:last]:
            moments = ("before", "middle", "after") if one["name"] == "write" else ("before", "after")
            at = one["number"] - first
            boundaries += [{"name": "killed", "victim": rank, "step": _SAVED, "at": at, "moment": moment} for moment in moments]
    return boundaries


def _kill(ground: Ground, unbroken: Unbroken, boundary: dict[str, Any], *, launched: bool) -> list[str]:
    run = "killed-{victim}-{at}-{moment}".format(**boundary)
    with ground.fork(run, fault=boundary) as job:
        statuses = job.wait()
        if statuses[boundary["victim"]] != -signal.SIGKILL:
            return [f"{run}: ranks ended with {statuses}, the kill did not come: {job.last_words()}"]
        job.leave_nothing()
    # Each of these raises where it is torn.
    survivors = [verify(checkpoint).step for _, checkpoint in committed(ground.path(run) / "checkpoints")]
    if survivors not in ([_SAVED - _EVERY], [_SAVED - _EVERY, _SAVED], [_SAVED]):
        return [f"{run}: checkpoints of steps {survivors} were left"]
    with ground.launch(run) if launched else ground.fork(run) as job:
        end_in_order(job)
    problems = unbroken.problems(ground.path(run), last_step=_STEPS)
    problems += [f"{name} was left" for name in left_in(ground.path(run) / "checkpoints")]
    shutil.rmtree(ground.path(run))
    return [f"{run}: {problem}" for problem in problems]


DRILLS = (Drill("with the engine: SIGKILL of a rank at boundaries of a save", kills, needs_engine=True),)
