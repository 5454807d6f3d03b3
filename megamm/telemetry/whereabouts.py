"""Where a rank is: noted by whoever does the work, read by the threads that watch it and by records of its failure."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Phase = Literal["start", "data", "train", "evaluate", "save", "rewind", "leave"]

Samples = Callable[[], Sequence[Any]]
"""Names the samples at hand when it is called, as dataclasses with `dataset`, `shard`, `key`, `micro_step` and `row`."""

_RECENT_STEPS = 64


def no_samples() -> Sequence[Any]:
    """Of phases that work on no samples."""
    return ()


@dataclass(frozen=True, slots=True)
class Who:
    """A rank of one start of a run.

    Attributes:
        start: Number of the run's owner, from 1: every start of a run has a higher one.
        rank: Global rank.
        world_size: Number of ranks.
        job_id: Of the scheduler; empty without one.
        restart_count: How often the scheduler had restarted that job.
        host: Name of the machine.
        pid: Process.
    """

    start: int
    rank: int
    world_size: int
    job_id: str = ""
    restart_count: int = 0
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank is at.

    Attributes:
        phase: Kind of work.
        step: The step under way, or the one that was done last.
        began: When it was noted, on the monotonic clock.
        is_first_step: Whether this start has finished no step yet.
        samples: What it works on.
    """

    phase: Phase
    step: int
    began: float
    is_first_step: bool
    samples: Samples


class Whereabouts:
    """This rank's place and pace. A note is an assignment, so that it costs nothing and needs no lock.

    State: the place, how long the last steps took, and the last evaluation. The first step after a start is left out: it allocates,
    compiles and fills caches.
    """

    def __init__(self) -> None:
        self.place = Place("start", 0, time.monotonic(), True, no_samples)
        self.evaluation_seconds = 0.0
        self._step_began = self._evaluation_began = 0.0
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    def enter(self, phase: Phase, step: int, samples: Samples = no_samples) -> None:
        """Note what is done from now on; noting the same again says that it makes progress."""
        now, last = time.monotonic(), self.place
        if phase == "data":
            self._step_began = now
        if phase == "evaluate" and last.phase != "evaluate":
            self._evaluation_began = now
        if last.phase == "evaluate" and phase != "evaluate":
            self.evaluation_seconds = now - self._evaluation_began
        has_stepped = last.phase == "train" and phase != "train"
        if has_stepped and not last.is_first_step:
            self._step_seconds.append(now - self._step_began)
        self.place = Place(phase, step, now, last.is_first_step and not has_stepped, samples)

    @property
    def longest_step_seconds(self) -> float:
        """Of the last steps, waiting for data included; 0 before the second one is done."""
        return max(tuple(self._step_seconds), default=0.0)
