"""Runs that go on at another number of ranks, again and again, over a mixture, packed rows and rotten samples."""

from __future__ import annotations

import functools
import math
import random
import shutil
from pathlib import Path

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.engine.attempts import outcome
from benchmarks.drills.engine.equality import Unbroken, numbers, same_state
from benchmarks.drills.engine.ground import Ground
from megamm.checkpoint.manifest import step_folder

_TRIES: dict[Size, int] = {"quick": 2, "normal": 15, "full": 60}
_STEPS = 10
_RANKS, _MICRO_ROWS = (1, 2, 3), (1, 2, 3, 6)
_TOLERANCE = 2e-6
"""Of a loss, as a share of it: float32 sums in another order, carried through the steps."""

Link = tuple[int, int, int]
"""Ranks, rows a micro-step, and the step after which they leave."""


def chains(size: Size, folder: Path) -> Tally:
    """Each chain ends with the samples of the unbroken run; what is loaded is, tensor by tensor, what was saved."""
    draw = random.Random(15)
    with Ground(folder, f"--train.steps={_STEPS}", "--engine.precision=fp32", "--checkpoint.every=0", "--checkpoint.keep_last=9") as ground:
        unbroken = Unbroken.train(ground)
        drawn = [_draw(draw) for _ in range(_TRIES[size])]
        errors: list[float] = []
        problems = [outcome(functools.partial(_follow, ground, unbroken, chain, errors)) for chain in drawn]
    num_links = sum(map(len, drawn))
    note = f"{num_links} starts on 1 to 3 ranks with 1 to 6 rows a micro-step; losses differ by up to {max(errors, default=0):.1g}"
    return Tally.of(problems, f"{note} of themselves (allowed {_TOLERANCE:g})")


def _draw(draw: random.Random) -> list[Link]:
    stops = sorted(draw.sample(range(1, _STEPS), draw.randint(1, 3)))
    chain: list[Link] = []
    for stop in [*stops, _STEPS]:
        others = [number for number in _RANKS if not chain or number != chain[-1][0]]
        chain.append((draw.choice(others), draw.choice(_MICRO_ROWS), stop))
    return chain


def _follow(ground: Ground, unbroken: Unbroken, chain: list[Link], errors: list[float]) -> list[str]:
    name = "chain-" + "-".join(f"{num_ranks}x{micro_rows}to{stop}" for num_ranks, micro_rows, stop in chain)
    run, proof = ground.path(name), ground.path(f"{name}-as-loaded")
    problems = []
    begin = 0
    for num_ranks, micro_rows, stop in chain:
        words = (f"--batch.micro_rows={micro_rows}", f"--stop-after={stop}")
        ground.train(name, *words, num_ranks=num_ranks, fault={"name": "proven", "folder": str(proof)})
        if begin:
            problems += same_state(run / "checkpoints" / step_folder(begin), proof / step_folder(begin))
        begin = stop
    problems += unbroken.problems(run, last_step=_STEPS, bit_for_bit=False)
    shares = [_difference(line["loss"], unbroken.lines[step]["loss"]) for step, line in numbers(run).items()]
    errors.append(max(shares, default=math.inf))
    if errors[-1] > _TOLERANCE:
        problems.append(f"a loss differs by {errors[-1]:.2g} of itself")
    for path in (run, proof):
        shutil.rmtree(path, ignore_errors=True)
    return [f"{name}: {problem}" for problem in problems]


def _difference(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


DRILLS = (Drill("with the engine: chains of world sizes", chains, needs_engine=True),)
