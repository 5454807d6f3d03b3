"""Plans over datasets that have no files: lengths alone decide what is planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megamm.config import Batching, Data, Dataset
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.rows import DEFAULT_COSTS
from megamm.data.samples.datasets import ShardSet

CAPACITY = (100, 40, 40)


def shard_set(name: str, num_samples: list[int], tokens: int | None = None, *, seed: int = 0, shards: str = "shards") -> ShardSet:
    """A dataset without files; every sample takes `tokens` tokens, or random lengths of which some fit no row."""
    starts = np.cumsum([0, *num_samples], dtype=np.int64)
    tars = tuple(Path(f"{name}-{shard:05}.tar") for shard in range(len(num_samples)))
    size = (int(starts[-1]), 1, 3)
    lengths = np.random.default_rng(seed).integers(1, (121, 51, 51), size) if tokens is None else np.full(size, (tokens, 0, 0))
    return ShardSet(name, tars, starts, "digest", ("text",), "key", lengths.astype(np.int32), shards)


def plan_of(
    datasets: list[ShardSet], tokenizer, *, weights=None, seed: int = 0, num_rows: int = 8, costs=DEFAULT_COSTS, **changes
) -> DataPlan:
    """A plan over such datasets; other keywords are settings of `Data`."""
    train = {dataset.name: Dataset("x", weight) for dataset, weight in zip(datasets, weights or [1.0] * len(datasets), strict=True)}
    data = replace(Data(train=train, window=64, row_patches=CAPACITY[1], row_frames=CAPACITY[2]), **changes)
    batch = Batching(row_tokens=CAPACITY[0], global_rows=num_rows)
    return DataPlan(datasets, data, batch, rules=MediaRules(None, None), tokenizer=tokenizer, seed=seed, costs=costs)
