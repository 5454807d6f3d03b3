"""Contestants in processes of their own, taken in turn; what counts is the processor time of all their processes.

A contestant runs ahead until its queues are full. Each turn begins and ends in that state, so the time between is the time of exactly
the samples that were taken, workers and threads included, whoever ran them and whenever.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

_QUIET_SECONDS = 0.4
_QUIET_SHARE = 0.05
_MAX_WAIT_SECONDS = 60.0
_MAX_EXIT_SECONDS = 20.0
CHECKOUT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Turn:
    """What a contestant did in one turn: what it delivered (counts by name), and the processor seconds of all its processes."""

    delivered: Mapping[str, int]
    cpu_seconds: float

    @property
    def cpu_ms(self) -> float:
        """Processor milliseconds a sample."""
        return self.cpu_seconds / self.delivered["samples"] * 1e3


class Contestant:
    """A process of `benchmarks.peers`; a context manager."""

    def __init__(self, name: str, folder: Path, *, python: str = sys.executable, environment: Mapping[str, str] | None = None) -> None:
        """Start it and wait until it has delivered its first batch.

        Raises:
            RuntimeError: It ended before.
        """
        self.name = name
        # One thread a worker for everybody: what is compared is work, not how many cores a matrix product takes.
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peers", name, str(folder)],
            cwd=CHECKOUT,
            env={**os.environ, **threads, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def take(self, num_samples: int) -> Turn:
        """Let it deliver at least `num_samples` and fill its queues again."""
        before = self._settled_cpu_seconds()
        assert self._process.stdin is not None, "opened with a pipe"
        print(num_samples, file=self._process.stdin, flush=True)
        delivered = json.loads(self._answer())
        return Turn(delivered, self._settled_cpu_seconds() - before)

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        workers = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        assert self._process.stdin is not None, "opened with a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(_MAX_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for worker in workers:
            if worker.is_running():
                worker.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None, "opened with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"contestant {self.name} ended with code {self._process.wait()}; its error stands above")
        return line

    def _settled_cpu_seconds(self) -> float:
        """Processor time of all its processes, once they only idle."""
        deadline = time.monotonic() + _MAX_WAIT_SECONDS
        last = self._cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(_QUIET_SECONDS)
            now = self._cpu_seconds()
            if now - last <= _QUIET_SHARE * _QUIET_SECONDS:
                return now
            last = now
        raise RuntimeError(f"contestant {self.name} is still busy {_MAX_WAIT_SECONDS:.0f} s after it delivered")

    def _cpu_seconds(self) -> float:
        """Of the process, of its living descendants and of those that have ended."""
        process = psutil.Process(self._process.pid)
        return sum(sum(one.cpu_times()[:4]) for one in [process, *process.children(recursive=True)])


def race(contestants: Sequence[Contestant], *, num_rounds: int, num_samples: int) -> dict[str, list[Turn]]:
    """Turns of all contestants, one after the other in every round; a round before does not count."""
    for contestant in contestants:
        contestant.take(num_samples)
    turns: dict[str, list[Turn]] = {contestant.name: [] for contestant in contestants}
    for _ in range(num_rounds):
        for contestant in contestants:
            turns[contestant.name].append(contestant.take(num_samples))
    return turns
