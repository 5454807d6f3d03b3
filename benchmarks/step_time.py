"""What the loader costs a training step: the recipe `tiny` under the real engine, fed by the loader or from memory.

One rank, in blocks of steps: first those that the loader delivers while it decodes ahead, then the very same batches again
from memory, while the loader, its queue full, rests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from benchmarks.race import CHECKOUT
from benchmarks.results import Row, measured
from megamm.config import Recipe, load_recipe
from megamm.data.loading.loader import StepData, StepLoader
from megamm.prepare.tokenizer import make_tokenizer

GOAL = "<= 1.05"
_SOURCES = {"digits": "digits", "words": "words", "digit_text": "text"}
_LEAD_STEPS = 2
_REST_SECONDS = 1.0


def step_time_rows(folder: Path, *, num_blocks: int, block_steps: int, decoders: str = "threads", num_workers: int = 1) -> list[Row]:
    """Measure in a process of its own, because the engine stays in the process that starts it.

    Args:
        folder: From `make_tiny`.
        num_blocks: Blocks of each kind.
        block_steps: Steps of a block.
        decoders: `data.decoders`.
        num_workers: `data.decode_workers`.
    """
    words = [str(folder), str(num_blocks), str(block_steps), decoders, str(num_workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    command = [sys.executable, "-m", "benchmarks.step_time", *words]
    found = json.loads(subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    how = f"tiny, one rank, {num_workers} decoding {decoders}"
    memory = "the same batches from memory"
    return [
        measured(f"step of tiny from memory, {decoders}", found["memory_ms"], "ms", peer=how),
        measured(f"step of tiny: loader / memory, {decoders}, wall", found["wall"], "×", goal=GOAL, peer=memory),
        measured(f"step of tiny: loader / memory, {decoders}, CPU", found["cpu"], "×", goal=GOAL, peer=f"{memory}; as on one core"),
    ]


def make_tiny(folder: Path, *, with_sounds: bool = True) -> Path:
    """Prepare the data and the tokenizer of the recipe `tiny`, by the command that a user runs; speech takes longest."""
    for source, name in _SOURCES.items():
        if source != "words" or with_sounds:
            _megamm("prepare", source, "--output", folder / "data" / name)
    make_tokenizer(_recipe(folder))
    return folder


def _recipe(folder: Path) -> Recipe:
    """The recipe `tiny` over what was prepared."""
    recipe = load_recipe("tiny")
    train = {name: dataset for name, dataset in recipe.data.train.items() if (folder / "data" / name).is_dir()}
    data = replace(recipe.data, root=str(folder / "data"), train=train, held_out={})
    return replace(recipe, data=data, tokenizer=replace(recipe.tokenizer, folder=str(folder / "data" / "tokenizer")))


def _megamm(*words: object) -> None:
    command = [sys.executable, "-m", "megamm.cli", *map(str, words)]
    subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Print the ratios of the blocks."""
    folder, num_blocks, block_steps, decoders, num_workers = sys.argv[1:]
    recipe = _recipe(Path(folder))
    recipe = replace(recipe, data=replace(recipe.data, decoders=decoders, decode_workers=int(num_workers)))
    blocks = _measure(recipe, int(num_blocks), int(block_steps))
    found = {
        "memory_ms": [memory.wall_seconds / int(block_steps) * 1e3 for _, memory in blocks],
        "wall": [loaded.wall_seconds / memory.wall_seconds for loaded, memory in blocks],
        "cpu": [loaded.cpu_seconds / memory.cpu_seconds for loaded, memory in blocks],
    }
    print(json.dumps(found), flush=True)


@dataclass(frozen=True, slots=True)
class _Block:
    """Wall and processor seconds of a block, worker processes of the loader included."""

    wall_seconds: float
    cpu_seconds: float


def _measure(recipe: Recipe, num_blocks: int, block_steps: int) -> list[tuple[_Block, _Block]]:
    from megamm.engine import distributed
    from megamm.train.build import build_trainer, load_tokenizer
    from megamm.train.data import TrainingData
    from megamm.train.step import count, train_step

    world = distributed.start()
    tokenizer = load_tokenizer(recipe)
    data = TrainingData.open(recipe, tokenizer, world)
    trainer = build_trainer(recipe, tokenizer, world)

    def train(steps: Iterable[StepData]) -> list[StepData]:
        done = []
        for step in steps:
            facts = {"waited_seconds": 0.0, "flops": 0.0, "failed": False, "stop_requested": False, "world": world}
            counts = count(step.micro_batches, skipped=[], datasets=tuple(data.plan.datasets), tasks=data.tasks, **facts)
            train_step(trainer, step.micro_batches, counts, world=world, tasks=data.tasks)
            done.append(step)
        return done

    blocks = []
    with StepLoader(data.plan, task_weights=recipe.loss.task_weights) as loader:
        train(islice(loader, 2 * _LEAD_STEPS))  # what is compiled or allocated once
        for _ in range(num_blocks):
            # The queue is full after a rest: steps that only empty it would look cheap, so they do not count.
            train(islice(loader, recipe.data.prefetch_steps + _LEAD_STEPS))
            loaded, steps = _timed(train, islice(loader, block_steps))
            time.sleep(_REST_SECONDS)
            train(steps[:_LEAD_STEPS])
            memory, _ = _timed(train, steps)
            blocks.append((loaded, memory))
    distributed.stop()
    return blocks


def _timed(work, steps: Iterable[StepData]) -> tuple[_Block, list[StepData]]:
    cpu, wall = _cpu_seconds(), time.monotonic()
    done = work(steps)
    return _Block(time.monotonic() - wall, _cpu_seconds() - cpu), done


def _cpu_seconds() -> float:
    import psutil

    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


if __name__ == "__main__":
    main()
