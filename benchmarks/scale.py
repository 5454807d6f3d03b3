"""A billion samples: opening, seeking, planning. Runs in a process of its own, whose memory nothing else has grown.

Shards of that size do not fit a benchmark. Opening is measured on the real files of ten thousand shards, hard links of one. Seeking and
planning read a mapped file of the lengths of a billion samples as the loader does; only the lengths that are looked at are on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.memory import PeakMemory
from benchmarks.planning import small_tokenizer
from benchmarks.race import CHECKOUT
from benchmarks.results import Row
from megamm.config import Batching, Data, Dataset, Model, Tower, load_recipe
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.state import LoaderState
from megamm.data.samples.datasets import ShardSet
from megamm.data.samples.lengths import IN_MEMORY_SAMPLES, ensure_lengths
from megamm.prepare.source import Draft
from megamm.prepare.writer import ShardFile, sample_files

NUM_SAMPLES = 10**9
SAMPLES_A_SHARD = 10_000
PLACES = (0, 123_456_789, 987_654_321)
"""Positions that are sought, each moved to the start of its window."""
_SHARED_MEMORY = Path("/dev/shm")
_MAX_SECONDS, _MAX_MB = "< 1", "< 200"


def scale_rows(*, num_shards: int) -> list[Row]:
    """Run the measurements in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.scale", str(num_shards)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = json.loads(subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    rows = []
    for name, peer in (
        ("open", f"{num_shards:,} shards on disk"),
        ("seek", "resume from a state in mid-run, whichever"),
        ("plan", "the first step after seeking, window planned anew"),
    ):
        seconds, megabytes = found[name]
        rows += [
            Row(f"a billion samples: {name}", seconds, "s", _MAX_SECONDS, None, peer),
            Row(f"a billion samples: {name}, memory", megabytes, "MB", _MAX_MB, None, peer),
        ]
    return rows


def main() -> None:
    """Print seconds and megabytes of opening, seeking and planning, the worst of their places."""
    with tempfile.TemporaryDirectory() as folder:
        opened = _open(Path(folder), int(sys.argv[1]))
    # Deleting a file with very many holes takes a disk seconds.
    with tempfile.TemporaryDirectory(dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None) as folder:
        sought, planned = _seek_and_plan(Path(folder))
    print(json.dumps({"open": opened, "seek": sought, "plan": planned}))


def _open(folder: Path, num_shards: int) -> tuple[float, float]:
    """Open hard links of one shard of short texts, more samples together than are read into memory."""
    tokenizer = small_tokenizer(folder / "tokenizer")
    model, batch = Model(text=Tower("qwen3")), Batching()
    data = Data(root=str(folder), train={"text": Dataset("text-*.tar")})
    rules = MediaRules.of(model, data)
    first = folder / "text-000000.tar"
    with ShardFile(first) as shard:
        for number in range(-(-(IN_MEMORY_SAMPLES + 1) // num_shards)):
            document = {"task": "text", "messages": [{"role": "assistant", "content": f"text number {number}"}]}
            shard.add(f"t{number:06}", sample_files(f"t{number:06}", Draft(document)))
    ensure_lengths([first], tokenizer, rules)
    files = [path for path in folder.iterdir() if path.name.startswith(first.name)]
    for number in range(1, num_shards):
        for file in files:
            os.link(file, file.with_name(file.name.replace("000000", f"{number:06}", 1)))
    ensure_lengths(sorted(folder.glob("text-*.tar")), tokenizer, rules)
    return _measured(lambda: DataPlan.open(data, batch, model=model, tokenizer=tokenizer, seed=0))


def _seek_and_plan(folder: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    recipe = load_recipe("1b")
    data = Data(train={"text": Dataset("text")}, window=recipe.data.window)
    rules = MediaRules.of(Model(text=Tower("qwen3")), data)
    tokenizer = small_tokenizer(folder / "tokenizer")

    def plan(lengths: np.ndarray | _Drawn) -> DataPlan:
        return DataPlan([_dataset(lengths)], data, recipe.batch, rules=rules, tokenizer=tokenizer, seed=0)

    drawn = _Drawn(np.lib.format.open_memmap(folder / "lengths.npy", mode="w+", dtype=np.int32, shape=(NUM_SAMPLES, 1, 3)))
    drawing = plan(drawn)
    states = [_state_at(drawing, place // data.window * data.window) for place in PLACES]
    for state in states:
        drawing.next_step(state)
    drawn.array.flush()
    del drawing, drawn

    ready = plan(np.load(folder / "lengths.npy", mmap_mode="r"))
    found: list[LoaderState] = []
    sought = [_measured(lambda state=state: found.append(ready.resume(LoaderState.from_json(state.to_json())))) for state in states]
    planned = [_measured(lambda state=state: ready.next_step(state)) for state in found]
    return _worst(sought), _worst(planned)


@dataclass(frozen=True)
class _Drawn:
    """Lengths that are drawn, and stay, when they are first looked at: a file of all of them would take 12 GB."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        numbers, variants = places
        tokens = np.random.default_rng(int(numbers[0])).lognormal(np.log(250), 1.3, len(numbers))
        self.array[numbers, variants, 0] = tokens.clip(2, 4000)
        return self.array[places]


def _dataset(lengths: np.ndarray | _Drawn) -> ShardSet:
    starts = np.arange(0, NUM_SAMPLES + 1, SAMPLES_A_SHARD)
    tars = tuple(Path(f"text-{shard:06}.tar") for shard in range(len(starts) - 1))
    return ShardSet("text", tars, starts, "digest", ("text",), "key", lengths, "shards")  # type: ignore[arg-type]


def _state_at(plan: DataPlan, position: int) -> LoaderState:
    start = plan.start()
    return replace(start, plan=replace(start.plan, position=position))


def _measured(work: Callable[[], object]) -> tuple[float, float]:
    with PeakMemory() as memory:
        started = time.monotonic()
        kept = work()
        seconds = time.monotonic() - started
    del kept
    return seconds, memory.added_bytes / 1e6


def _worst(measured: list[tuple[float, float]]) -> tuple[float, float]:
    return max(seconds for seconds, _ in measured), max(megabytes for _, megabytes in measured)


if __name__ == "__main__":
    main()
