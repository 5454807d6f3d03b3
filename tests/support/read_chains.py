"""Chains that are read by real loaders: shards of which some bytes rotted, weights that change, samples that are excluded."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from megamm.config import Batching, Data, Dataset, WeightChange
from megamm.data.loading.loader import StepLoader
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.state import LoaderState
from megamm.tokenizers.text import TextTokenizer
from tests.data.conftest import MODEL
from tests.support.chains import Leg

SCHEDULE = (WeightChange(4, {"words": 4.0}), WeightChange(9, {"digits": 0.0}))
EXCLUDED: dict[int, tuple[str, ...]] = {6: ("digits/d0-3", "text/t5-2"), 11: ("words/w1-4",)}
NUM_STEPS = 15
ReadStep: TypeAlias = tuple[list[str], list[str], list[tuple[int, str, str]], LoaderState]
"""Planned keys in order, delivered keys, (position, key, reason) of what was skipped, and the state after the step."""


def rotten_copy(corpus: Path, root: Path) -> Path:
    """The corpus with one byte of a picture and one of a sound changed after they were indexed."""
    shutil.copytree(corpus, root)
    for name, mark in (("digits/train-00001.tar", b"\xff\xd8\xff"), ("words/train-00000.tar", b"fLaC")):
        content = bytearray((root / name).read_bytes())
        content[content.index(mark) + 200] ^= 4
        (root / name).write_bytes(content)
    return root


def open_rotten(root: Path, tokenizer: TextTokenizer, batch: Batching, **changes: Any) -> DataPlan:
    """A plan over it; keywords replace settings of `Data`."""
    train = {name: Dataset(f"{name}/train-*.tar", weight) for name, weight in (("digits", 3.0), ("words", 1.0), ("text", 2.0))}
    data = Data(root=str(root), train=train, window=32, row_patches=48, row_frames=400, schedule=SCHEDULE, max_skipped_share=1.0)
    return DataPlan.open(replace(data, **changes), batch, model=MODEL, tokenizer=tokenizer, seed=5)


def read_steps(plan: DataPlan, state: LoaderState, leg: Leg) -> list[ReadStep]:
    """The steps of a leg, read by its ranks one after the other."""
    loaders = [StepLoader(plan, rank=rank, world_size=leg.world_size, state=state) for rank in range(leg.world_size)]
    steps = []
    try:
        for _ in range(leg.num_steps):
            parts = [next(loader) for loader in loaders]
            assert all(part.keys == parts[0].keys and part.state == parts[0].state for part in parts)
            assert len({len(part.micro_batches) for part in parts}) == 1
            delivered = sorted(key for part in parts for batch in part.micro_batches for row in batch.keys for key in row)
            skipped = sorted((entry.position, f"{entry.dataset}/{entry.key}", entry.reason) for part in parts for entry in part.skipped)
            steps.append((parts[0].keys, delivered, skipped, parts[0].state))
    finally:
        for loader in loaders:
            loader.close()
    return steps


def read_unbroken(root: Path, tokenizer: TextTokenizer) -> list[ReadStep]:
    """The run that was stopped only to exclude samples, on one rank."""
    steps: list[ReadStep] = []
    plan = open_rotten(root, tokenizer, Batching(row_tokens=128, global_rows=6))
    state = plan.start()
    for first, last in itertools.pairwise([0, *EXCLUDED, NUM_STEPS]):
        state = state.excluding(EXCLUDED[first]) if first else state
        steps += read_steps(plan, state, Leg(last - first, 1, plan.batch))
        state = steps[-1][-1]
    return steps


def draw_read_legs(number: int) -> Iterator[tuple[Leg, dict[str, Any]]]:
    """A chain of legs with the settings that each reads with; together they are the unbroken run."""
    rng = random.Random(number)
    done = 0
    while done < NUM_STEPS:
        world_size, micro_rows = rng.randint(1, 5), rng.randint(1, 3)
        limit = next(step for step in (*EXCLUDED, NUM_STEPS) if step > done)
        batch = Batching(row_tokens=128, global_rows=6, micro_rows=micro_rows)
        leg = Leg(rng.randint(1, limit - done), world_size, batch, EXCLUDED.get(done, ()))
        yield leg, {"decode_workers": rng.randint(1, 3), "prefetch_steps": rng.randint(1, 4)}
        done += leg.num_steps
