"""What a recipe's data, or some shards, hold: lengths, sizes, seconds, tasks and packing, from sidecars alone.

Nothing is decoded and no shard is opened. Memory does not grow with the number of samples: only counts are kept.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megamm.config import Recipe
from megamm.core.tables import markdown
from megamm.data.loading.held_out import HeldOut
from megamm.data.planning.deal import deal, resolve_accumulation
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.lengths import load_lengths
from megamm.data.shards.index import ShardIndex, load_index, problem_kinds
from megamm.data.shards.places import Shard, sidecar_path
from megamm.tokenizers.text import TextTokenizer

NUM_WINDOWS = 64
"""Windows of positions that are planned to see how they pack; the order is shuffled, so the first ones speak for all."""
SECONDS_UNIT = 0.05
_WORLD_SIZES = (2, 8, 64, 512)
_MAX_COUNTED = 1 << 22
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_LENGTHS_ENDING = ".lengths-"
_IMAGE, _AUDIO = 1, 2
SIDE_EDGES = np.round(np.geomspace(1, 65_536, 65)).astype(np.int64)
"""Edges of the bins of a picture's width and height, in pixels."""


class Counts:
    """How often each whole number occurs. State: the counts, as long as the largest number.

    Args:
        unit: What one stands for, such as 0.1 for tenths of a second.
    """

    def __init__(self, unit: float = 1.0):
        self.unit = unit
        self.counts = np.zeros(0, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count more numbers; those beyond four million count as that many."""
        more = np.bincount(np.minimum(values, _MAX_COUNTED))
        longer, shorter = (more, self.counts) if len(more) > len(self.counts) else (self.counts, more)
        longer = longer.astype(np.int64)
        longer[: len(shorter)] += shorter
        self.counts = longer

    @property
    def num(self) -> int:
        """Numbers counted."""
        return int(self.counts.sum())

    @property
    def total(self) -> float:
        """Their sum, in units of what they measure."""
        return float(self.counts @ np.arange(len(self.counts))) * self.unit

    def quantile(self, share: float) -> float:
        """The smallest number that at least a share of all does not exceed; 0 where there are none."""
        return float(np.searchsorted(np.cumsum(self.counts), max(1, share * self.num))) * self.unit if self.num else 0.0

    def to_json(self) -> dict[str, Any]:
        """Mean and quantiles, and all counts that are not 0."""
        numbers = np.flatnonzero(self.counts)
        return {
            "num": self.num,
            "mean": self.total / self.num if self.num else 0.0,
            "min": float(numbers[0]) * self.unit if self.num else 0.0,
            "max": float(numbers[-1]) * self.unit if self.num else 0.0,
            **{f"p{share * 100:g}": self.quantile(share) for share in _QUANTILES},
            "unit": self.unit,
            "counts": {str(number): int(self.counts[number]) for number in numbers.tolist()},
        }


@dataclass
class DatasetStats:
    """One dataset; grows shard by shard.

    Attributes:
        name: Its name.
        part: `train` or `held_out`; empty for shards without a recipe.
        num_shards: Shards.
        num_samples: Samples.
        num_bytes: Of the shards.
        tokens: Of the samples that can be used; None without planned lengths.
        task_samples: Task -> samples.
        task_tokens: Task -> tokens.
        sides: int64[64, 64], pictures by width and height in bins of `SIDE_EDGES`.
        seconds: Of the sounds.
        problems: Reason -> samples that cannot be used.
    """

    name: str
    part: str
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    tokens: Counts | None = None
    task_samples: Counter[str] = field(default_factory=Counter)
    task_tokens: Counter[str] = field(default_factory=Counter)
    sides: np.ndarray = field(default_factory=lambda: np.zeros((len(SIDE_EDGES) - 1,) * 2, dtype=np.int64))
    seconds: Counts = field(default_factory=lambda: Counts(SECONDS_UNIT))
    problems: Counter[str] = field(default_factory=Counter)

    def add(self, shard: Shard, lengths_key: str | None) -> None:
        """Count one shard.

        Raises:
            DataError: A sidecar is missing or damaged.
        """
        index = load_index(shard)
        self.num_shards += 1
        self.num_samples += index.num_samples
        self.num_bytes += index.tar_size
        self._add_media(index)
        problems = index.problems
        if lengths_key is not None:
            lengths = load_lengths(shard, lengths_key)
            problems = lengths.problems
            usable = lengths.tokens > 0
            self.tokens = self.tokens or Counts()
            self.tokens.add(lengths.tokens[usable])
            for number, task in enumerate(lengths.task_names):
                own = usable & (lengths.tasks == number)
                self.task_samples[task] += int(own.sum())
                self.task_tokens[task] += int(lengths.tokens[own].sum())
        self.problems.update(problem_kinds(shard, index, problems))

    def _add_media(self, index: ShardIndex) -> None:
        pictures = index.media_sizes[index.media_types == _IMAGE]
        if len(pictures):
            self.sides += np.histogram2d(*pictures.T, bins=(SIDE_EDGES, SIDE_EDGES))[0].astype(np.int64)
        sounds = index.media_sizes[index.media_types == _AUDIO]
        if len(sounds):
            self.seconds.add(np.rint(sounds[:, 0] / sounds[:, 1] / SECONDS_UNIT).astype(np.int64))

    @property
    def num_pictures(self) -> int:
        """Pictures whose headers could be read."""
        return int(self.sides.sum())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        pictures = [
            [int(SIDE_EDGES[width]), int(SIDE_EDGES[height]), int(self.sides[width, height])] for width, height in np.argwhere(self.sides)
        ]
        return {
            "name": self.name,
            "part": self.part,
            "shards": self.num_shards,
            "samples": self.num_samples,
            "bytes": self.num_bytes,
            "tokens": self.tokens.to_json() if self.tokens else None,
            "tasks": {task: {"samples": num, "tokens": self.task_tokens[task]} for task, num in sorted(self.task_samples.items())},
            "pictures": {"num": self.num_pictures, "width_from_height_from_num": pictures},
            "seconds": self.seconds.to_json(),
            "problems": dict(self.problems.most_common()),
        }


@dataclass(frozen=True)
class PackingStats:
    """How the training data pack under a recipe.

    Attributes:
        row_tokens: Capacity of a row.
        fills: For tokens, patches and frames: share of the rows' capacity that each window uses.
        row_costs: Estimated cost of each row, see `RowCosts`.
        balance: World size -> mean over steps of the costliest rank's cost over the mean rank's.
        num_unfit: Samples that no row holds.
    """

    row_tokens: int
    fills: Mapping[str, list[float]]
    row_costs: list[float]
    balance: Mapping[int, float]
    num_unfit: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "row_tokens": self.row_tokens,
            "windows": len(self.fills["tokens"]),
            "rows": len(self.row_costs),
            "unfit": self.num_unfit,
            "fill": {name: {"mean": float(np.mean(fill)), "min": min(fill), "by_window": fill} for name, fill in self.fills.items()},
            "row_cost": {"mean": float(np.mean(self.row_costs)), "max": max(self.row_costs)},
            "max_over_mean_cost_of_ranks": {str(size): ratio for size, ratio in self.balance.items()},
        }


@dataclass(frozen=True)
class DataStats:
    """What was found: datasets, and how they pack where a recipe says into what."""

    datasets: list[DatasetStats]
    packing: PackingStats | None
    max_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"datasets": [one.to_json() for one in self.datasets], "packing": self.packing.to_json() if self.packing else None}

    def to_markdown(self) -> str:
        """The tables for people."""
        lines = markdown(_DATASET_COLUMNS, [_dataset_row(one) for one in self.datasets])
        if tasks := _task_rows(self.datasets):
            lines += ["", *markdown(("part", "task", "samples", "tokens", "share of tokens"), tasks)]
        if self.packing is not None:
            lines += ["", *markdown(("packing", "value"), _packing_rows(self.packing))]
        if any(one.tokens is None for one in self.datasets):
            lines += ["", _NOT_PLANNED]
        problems = [(one.name, reason, num) for one in self.datasets for reason, num in one.problems.most_common()]
        if problems:
            lines += ["", *markdown(("dataset", "cannot be used because", "samples"), problems)]
        return "\n".join(lines)


def recipe_stats(recipe: Recipe, tokenizer: TextTokenizer) -> DataStats:
    """The data of a recipe, whose lengths must have been planned.

    Raises:
        ConfigError: The recipe names no training data.
        DataError: Sidecars are missing or damaged.
    """
    plan = DataPlan.open(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer, seed=recipe.seed)
    parts = {"train": plan.datasets}
    if recipe.data.held_out:
        parts["held_out"] = HeldOut(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer).datasets
    found = []
    for part, datasets in parts.items():
        for dataset in datasets.values():
            stats = DatasetStats(dataset.name, part)
            for shard in dataset.tars:
                stats.add(shard, dataset.key)
            found.append(stats)
    return DataStats(found, packing_stats(plan), recipe.model.audio_features.max_seconds if recipe.model.audio else None)


def shard_stats(shards: Sequence[Shard]) -> DataStats:
    """Shards without a recipe; lengths in tokens where all of them were planned under the same settings alone.

    Raises:
        DataError: An index is missing or damaged.
    """
    key = _common_lengths(shards)
    by_folder: dict[str, DatasetStats] = {}
    for shard in shards:
        folder = str(sidecar_path(shard, "").parent)
        by_folder.setdefault(folder, DatasetStats(folder, "")).add(shard, key)
    return DataStats(list(by_folder.values()), None)


def packing_stats(plan: DataPlan) -> PackingStats:
    """Plan the first windows and measure them.

    Raises:
        DataError: No sample fits a row.
    """
    state, windows, num_unfit = plan.start(), {}, 0
    sizes = [size for size in _WORLD_SIZES if size <= plan.batch.global_rows]
    ratios: dict[int, list[float]] = {size: [] for size in sizes}
    while len(windows) <= NUM_WINDOWS:
        step = plan.next_step(state)
        state = step.state
        num_unfit += len(step.unfit)
        windows.update({int(row.window.positions[0]): row.window for row in step.rows})
        for size in sizes:
            batch = replace(plan.batch, accumulation=0)
            hands = deal(step.rows, size, batch.micro_rows, resolve_accumulation(batch, size))
            costs = [sum(row.cost for slots in hand for row in slots if row is not None) for hand in hands]
            ratios[size].append(max(costs) * size / (sum(costs) or 1.0))
    # The last one may have been opened only.
    done = list(windows.values())[:NUM_WINDOWS]
    capacity = np.array([plan.batch.row_tokens, plan.data.row_patches, plan.data.row_frames])
    fills = np.array([window.lengths[window.members].sum(axis=0) / (max(1, window.num_rows) * capacity) for window in done])
    return PackingStats(
        row_tokens=plan.batch.row_tokens,
        fills={name: fills[:, column].tolist() for column, name in enumerate(("tokens", "patches", "frames"))},
        row_costs=np.concatenate([window.costs for window in done]).tolist(),
        balance={size: float(np.mean(ratio)) for size, ratio in ratios.items()},
        num_unfit=num_unfit,
    )


_DATASET_COLUMNS = (
    *("dataset", "part", "shards", "samples", "size", "tokens", "tokens p50", "tokens p99", "tokens max"),
    *("pictures", "sounds", "hours", "cannot be used"),
)

_NOT_PLANNED = (
    "tokens: not planned, or under the settings of several recipes; run `megamm data plan-lengths RECIPE`, then `megamm data stats RECIPE`"
)


def _dataset_row(one: DatasetStats) -> tuple[Any, ...]:
    media = (one.num_pictures, one.seconds.num, one.seconds.total / 3600)
    lengths = _lengths(one.tokens)
    return one.name, one.part or "-", one.num_shards, one.num_samples, _size(one.num_bytes), *lengths, *media, one.problems.total()


def _lengths(tokens: Counts | None) -> tuple[Any, ...]:
    if tokens is None:
        return ("-",) * 4
    longest = len(tokens.counts) - 1 if tokens.num else 0
    return int(tokens.total), int(tokens.quantile(0.5)), int(tokens.quantile(0.99)), longest


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


def _task_rows(datasets: Sequence[DatasetStats]) -> list[tuple[Any, ...]]:
    samples: Counter[tuple[str, str]] = Counter()
    tokens: Counter[tuple[str, str]] = Counter()
    for one in datasets:
        for task, num in one.task_samples.items():
            samples[one.part or "-", task] += num
            tokens[one.part or "-", task] += one.task_tokens[task]
    of_part = Counter[str]()
    for (part, _), num in tokens.items():
        of_part[part] += num
    return [
        (part, task, samples[part, task], num, num / max(1, of_part[part]))
        for (part, task), num in sorted(tokens.items(), key=lambda item: (item[0][0], -item[1]))
    ]


def _packing_rows(packing: PackingStats) -> list[tuple[str, Any]]:
    """Values as text, because each line has its own unit."""
    costs = np.array(packing.row_costs)
    rows = [
        ("windows, rows planned", f"{len(packing.fills['tokens']):,}, {len(costs):,}"),
        (f"fill of {packing.row_tokens:,} tokens a row", f"{np.mean(packing.fills['tokens']):.4f}"),
        ("fill of row_patches, row_frames", f"{np.mean(packing.fills['patches']):.4f}, {np.mean(packing.fills['frames']):.4f}"),
        ("cost of a row, median and most over mean", f"{np.median(costs) / costs.mean():.3f}, {costs.max() / costs.mean():.3f}"),
        ("samples that no row holds", f"{packing.num_unfit:,}"),
    ]
    return [*rows, *((f"costliest over mean rank, {size} ranks", f"{ratio:.4f}") for size, ratio in packing.balance.items())]


def _common_lengths(shards: Sequence[Shard]) -> str | None:
    """The one key under which every shard has planned lengths, if there is one."""
    common: set[str] | None = None
    for shard in shards:
        path = sidecar_path(shard, _LENGTHS_ENDING)
        keys = {one.name.removeprefix(path.name) for one in path.parent.glob(f"{glob.escape(path.name)}*")}
        common = keys if common is None else common & keys
    return next(iter(common)) if common and len(common) == 1 else None
