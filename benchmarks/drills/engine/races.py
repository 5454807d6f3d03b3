"""Saves that are still being written while the optimizer changes what they save."""

from __future__ import annotations

from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.engine.equality import Unbroken
from benchmarks.drills.engine.ground import Ground
from megamm.checkpoint.manifest import committed
from megamm.core.json_lines import read_json_lines

_SAVES: dict[Size, int] = {"quick": 5, "normal": 60, "full": 300}
_EVERY = 4
_SLOW_SECONDS = 0.3
"""Of the copying of a snapshot, and at most of each of several writes; steps take a tenth of a second."""


def races(size: Size, folder: Path) -> Tally:
    """Every save must hold the state of its own step, as the run has it whose training waits for each save."""
    num_steps = _SAVES[size] * _EVERY
    with Ground(folder, f"--train.steps={num_steps}") as ground:
        unbroken = Unbroken.train(ground)
        slow = {"name": "slow", "seconds": _SLOW_SECONDS}
        ground.train("raced", f"--checkpoint.every={_EVERY}", "--checkpoint.keep_last=1000000", fault=slow)
        run = ground.path("raced")
        found = {step: "; ".join(unbroken.problems_of_checkpoint(step, path)) for step, path in committed(run / "checkpoints")}
        problems = [found.get(step, f"no checkpoint of step {step}") for step in range(_EVERY, num_steps + 1, _EVERY)]
        problems.append("; ".join(unbroken.problems(run, last_step=num_steps)[:1]))
        overtaken = _num_overtaken(run)
    if overtaken < _SAVES[size] // 2:
        problems.append(f"only {overtaken} saves were overtaken by a step: nothing raced")
    return Tally.of(problems, f"{overtaken} saves ended after training had gone on by a step or more; the last try is the run as a whole")


def _num_overtaken(run: Path) -> int:
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if "checkpoint/step" in line]
    return sum(line["step"] > line["checkpoint/step"] for line in lines)


DRILLS = (Drill("with the engine: saves that race the optimizer", races, needs_engine=True),)
