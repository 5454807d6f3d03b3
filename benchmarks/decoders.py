"""Threads or processes? What decoding costs in each, and what each leaves of a training step: `python -m benchmarks.decoders [--quick]`.

All loaders are open at once and take turns. A turn begins and ends with a full queue, so it holds the work of its steps exactly; processor
time is that of this process and of its decoder processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil

from benchmarks.corpus import make_corpus
from benchmarks.results import Row, measured, write
from benchmarks.step_time import make_tiny, step_time_rows
from megamm.data.loading.loader import StepLoader
from megamm.data.planning.plan import DataPlan

COMMAND = "python -m benchmarks.decoders"
KINDS = (("threads", 1), ("threads", 2), ("processes", 1), ("processes", 2))
_POLL_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Turn:
    """Samples, processor seconds and wall seconds of a few steps."""

    num_samples: int
    cpu_seconds: float
    wall_seconds: float


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works; its figures are no result")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="megamm-decoders-") as name:
        folder = Path(name)
        corpus = make_corpus(folder / "corpus", num_shards=2 if quick else 8)
        rows = decoding_rows(corpus.plan, corpus.origin, num_turns=2 if quick else 5, num_steps=4)
        # Speech takes minutes to render, and decoding digits takes the larger share of a step.
        tiny = make_tiny(folder / "tiny", with_sounds=False)
        for kind, num_workers in (("threads", 1), ("processes", 1)):
            blocks = {"num_blocks": 2 if quick else 4, "block_steps": 10}
            rows += step_time_rows(tiny, decoders=kind, num_workers=num_workers, **blocks)
    print(write("decoders", COMMAND, rows, quick=quick).with_suffix(".md").read_text(encoding="utf-8"))


def decoding_rows(plan_of, origin: str, *, num_turns: int, num_steps: int) -> list[Row]:
    """Decode the same steps with each kind in turn.

    Args:
        plan_of: Makes a plan over the samples; keywords replace settings of `Data`.
        origin: What the samples are made of.
        num_turns: Of each kind.
        num_steps: Of a turn.
    """
    with ExitStack() as stack:
        loaders = {}
        for kind, num_workers in KINDS:
            plan: DataPlan = plan_of(decoders=kind, decode_workers=num_workers)
            loaders[kind, num_workers] = stack.enter_context(StepLoader(plan)), plan.data.prefetch_steps
        turns: dict[tuple[str, int], list[Turn]] = {one: [] for one in KINDS}
        for number in range(num_turns + 1):
            # Each turn another kind begins; the first round is not counted: it fills caches and queues.
            for one in _rotated(number):
                turn = _turn(*loaders[one], num_steps)
                if number:
                    turns[one].append(turn)
    base = turns[KINDS[0]]
    rows = []
    for kind, num_workers in KINDS:
        mine, how = turns[kind, num_workers], f"{num_workers} decoding {kind}; {origin}"
        rows.append(
            measured(f"decode: {kind}, {num_workers}", [turn.num_samples / turn.cpu_seconds for turn in mine], "samples/CPU s", peer=how)
        )
        rows.append(
            measured(f"decode: {kind}, {num_workers}, wall", [turn.num_samples / turn.wall_seconds for turn in mine], "samples/s", peer=how)
        )
        if mine is not base:
            ratios = [
                turn.cpu_seconds / turn.num_samples / (other.cpu_seconds / other.num_samples)
                for turn, other in zip(mine, base, strict=True)
            ]
            rows.append(measured(f"decode: CPU a sample, {kind}, {num_workers} / threads, 1", ratios, "×"))
    return rows


def _rotated(number: int) -> Iterator[tuple[str, int]]:
    start = number % len(KINDS)
    yield from (*KINDS[start:], *KINDS[:start])


def _turn(loader: StepLoader, prefetch_steps: int, num_steps: int) -> Turn:
    _fill(loader, prefetch_steps)
    cpu, wall = _cpu_seconds(), time.monotonic()
    num_samples = sum(step.num_samples for step in islice(loader, num_steps))
    _fill(loader, prefetch_steps)
    return Turn(num_samples, _cpu_seconds() - cpu, time.monotonic() - wall)


def _fill(loader: StepLoader, prefetch_steps: int) -> None:
    """Wait until nothing is left to decode ahead."""
    while len(loader._ready) < prefetch_steps:
        time.sleep(_POLL_SECONDS)


def _cpu_seconds() -> float:
    times = [psutil.Process().cpu_times(), *(child.cpu_times() for child in psutil.Process().children(recursive=True))]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    main()
