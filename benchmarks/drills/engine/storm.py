"""Minutes of random faults: those that a process must live with, in one that lives for as long; then those that end processes.

What is put: I/O errors, full disks and stalls in the operations of saves; ranks that stop for a moment; decoders that die;
SIGTERM, SIGUSR1, SIGKILL of one rank and of all; flipped and missing bytes in checkpoints; at last a shard that is written to,
and one that rots, while the run reads it.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.drills.drill import Drill, Size, Tally
from benchmarks.drills.engine import rot
from benchmarks.drills.engine.attempts import outcome
from benchmarks.drills.engine.equality import Unbroken, last_commit
from benchmarks.drills.engine.ground import Ground
from benchmarks.drills.engine.jobs import ForkedJob, Stuck, send
from benchmarks.drills.engine.resources import Growth, Holding, shared_names
from megamm.checkpoint.manifest import committed
from megamm.core.json_lines import read_json_lines

_SECONDS: dict[Size, float] = {"quick": 25.0, "normal": 900.0, "full": 3600.0}
_ALIVE_SHARE = 0.6
"""Of the time, in which no fault ends a process."""
_MAX_GROWTH_MIB: dict[Size, float] = {"quick": 64.0, "normal": 16.0, "full": 16.0}
"""Of both ranks together. A quick drill ends before everything has been loaded that is loaded once."""
_COMPARED: dict[Size, int] = {"quick": 5, "normal": 50, "full": 100}
"""Every so-manieth step, of which a checkpoint is kept for ever and held against the unbroken run's."""
_DECODER_SECONDS = 15.0
"""A decoder that is younger may be at a sample for the second time, which is its last try."""
_RECIPE = (
    "--train.steps=1000000",
    "--data.decoders=processes",
    # In bf16 torch keeps a compiled kernel for every shape that it meets on this kind of processor: memory would grow for minutes.
    "--engine.precision=fp32",
    "--checkpoint.every=5",
    "--checkpoint.keep_last=3",
    "--checkpoint.max_failures=1000000",
)


@dataclass
class _Storm:
    """What was put so far, and what came of it. State: all of it."""

    ground: Ground
    draw: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)

    def put(self, fault: str, problem: str = "") -> None:
        """Count a fault."""
        self.faults[fault] += 1
        self.problems.append(problem and f"{fault}: {problem}")


def storm(size: Size, folder: Path) -> Tally:
    """Both parts, the shards that change, and then the comparison of all that came of it with a run in fair weather."""
    compared = _COMPARED[size]
    with Ground(folder, *_RECIPE, f"--checkpoint.keep_every={compared}") as ground:
        weather = _Storm(ground, random.Random(2))
        names = shared_names()
        _live(weather, _SECONDS[size] * _ALIVE_SHARE)
        _die(weather, _SECONDS[size] * (1 - _ALIVE_SHARE))
        weather.put("shards written to under the run", outcome(lambda: rot.write_under(ground, "dying")))
        num_healthy = _last_step_of(ground, "dying")
        weather.put("samples that rot under the run", outcome(lambda: rot.rot_under(ground, "dying")))
        last_steps = {run: _last_step_of(ground, run) for run in ("living", "dying")}
        stop = f"--stop-after={max(last_steps.values())}"
        unbroken = Unbroken.train(ground, stop, "--checkpoint.keep_every=0", "--data.decoders=threads", every=compared)
        problems = [
            outcome(lambda: unbroken.problems(ground.path("living"), last_step=last_steps["living"])),
            outcome(lambda: rot.problems_of_rot(unbroken, ground.path("dying"), num_healthy)),
            outcome(lambda: [f"shared memory is left: {left}"] if (left := sorted(shared_names() - names)) else []),
        ]
        growth = Growth.over(weather.holdings)
        problems.append("; ".join(growth.problems(max_resident_mib=_MAX_GROWTH_MIB[size])))
    faults = ", ".join(f"{num} {name}" for name, num in sorted(weather.faults.items()))
    steps = f"{last_steps['living']} and {last_steps['dying']} steps bit-equal"
    return Tally.of([*weather.problems, *problems], f"{_SECONDS[size] / 60:.3g} minutes: {faults}; {steps}; while living: {growth}")


# --- faults that a process must live with ---


def _live(weather: _Storm, seconds: float) -> None:
    run = weather.ground.path("living")
    fault = {"name": "flaky", "share": 0.01, "stall_seconds": 0.5, "seed": weather.draw.randrange(1 << 30)}
    with weather.ground.fork("living", fault=fault) as job:
        job.until(lambda: last_commit(run) > 0, "nothing was committed")
        end = time.monotonic() + seconds
        while time.monotonic() < end and not job.is_over:
            if (holding := Holding.of(job.ranks())) is not None:
                weather.holdings.append(holding)
            if weather.draw.random() < 0.3:
                _PASSING[weather.draw.choice(list(_PASSING))](weather, job)
            time.sleep(weather.draw.uniform(0.1, 0.5))
        weather.problems.append(outcome(job.stop))
    failed = [line for line in read_json_lines(run / "metrics.jsonl") if "checkpoint/failed_step" in line]
    for _ in failed:
        weather.put("failed saves")


def _stop_for_a_moment(weather: _Storm, job: ForkedJob) -> None:
    pid = weather.draw.choice(job.ranks())
    send(pid, signal.SIGSTOP)
    time.sleep(weather.draw.uniform(0.1, 1.0))
    send(pid, signal.SIGCONT)
    weather.put("ranks that stood still")


def _kill_decoder(weather: _Storm, job: ForkedJob) -> None:
    decoders = [pid for pid in job.processes() if pid not in job.ranks() and _age_seconds(pid) > _DECODER_SECONDS]
    if decoders:
        send(weather.draw.choice(decoders), signal.SIGKILL)
        weather.put("decoders killed")


_PASSING: dict[str, Callable[[_Storm, ForkedJob], None]] = {"stop": _stop_for_a_moment, "decoder": _kill_decoder}


def _age_seconds(pid: int) -> float:
    try:
        return time.time() - psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


# --- faults that end processes ---


def _die(weather: _Storm, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        way = weather.draw.choice(list(_ENDS))
        weather.put(way, outcome(lambda way=way: _live_and_die(weather, way)))
        _spoil(weather)
    weather.problems.append(outcome(lambda: _come_further(weather)))


def _live_and_die(weather: _Storm, way: str) -> list[str]:
    flaky = {"name": "flaky", "share": 0.02, "stall_seconds": 0.2, "seed": weather.draw.randrange(1 << 30)}
    with weather.ground.fork("dying", fault=flaky) as job:
        job.until(lambda: job.is_listening(signal.SIGTERM) and job.is_listening(signal.SIGUSR1), "no rank listens to signals")
        time.sleep(weather.draw.uniform(0, 6))
        number, victims = _ENDS[way](job.ranks(), weather.draw)
        for pid in victims:
            send(pid, number)
        statuses = job.wait()
        job.leave_nothing()
        if number == signal.SIGKILL or statuses == [0] * len(statuses):
            return []
        return [f"ended with {statuses}: {job.last_words()}"]


_ENDS: dict[str, Callable[[Sequence[int], random.Random], tuple[signal.Signals, Sequence[int]]]] = {
    "SIGTERM": lambda ranks, draw: (signal.SIGTERM, ranks),
    "SIGUSR1 of one rank": lambda ranks, draw: (signal.SIGUSR1, [draw.choice(ranks)]),
    "SIGKILL of a rank": lambda ranks, draw: (signal.SIGKILL, [draw.choice(ranks)]),
    "SIGKILL of all": lambda ranks, draw: (signal.SIGKILL, ranks),
}


def _spoil(weather: _Storm) -> None:
    """Damage the newest checkpoint now and then, while nobody runs; one that is older stays good."""
    checkpoints = committed(weather.ground.path("dying") / "checkpoints")
    if len(checkpoints) < 2 or weather.draw.random() > 0.4:
        return
    path = weather.draw.choice(sorted(checkpoints[-1][1].iterdir()))
    content = bytearray(path.read_bytes())
    if weather.draw.random() < 0.5 or not content:
        path.write_bytes(content[: len(content) // 2])
        weather.put("files cut off")
    else:
        content[weather.draw.randrange(len(content))] ^= 1 << weather.draw.randrange(8)
        path.write_bytes(content)
        weather.put("bits flipped")


def _come_further(weather: _Storm) -> list[str]:
    """The run goes on after all that, and leaves in order."""
    before = last_commit(weather.ground.path("dying"))
    with weather.ground.fork("dying") as job:
        job.until(lambda: last_commit(weather.ground.path("dying")) > before, "nothing more was committed")
        return job.stop()


def _last_step_of(ground: Ground, run: str) -> int:
    last_step = last_commit(ground.path(run))
    if not last_step:
        raise Stuck(f"{run} never committed anything")
    return last_step


DRILLS = (Drill("with the engine: minutes of random faults", storm, needs_engine=True),)
