"""Which samples made up a step: rank, micro-step and row of each, and what became of it. Needs the run's shards, and no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megamm.config import load_resolved
from megamm.core.errors import ConfigError
from megamm.core.json_lines import read_json_lines
from megamm.core.tables import aligned
from megamm.data.planning.deal import deal, resolve_accumulation
from megamm.data.planning.plan import DataPlan, PlannedStep
from megamm.data.planning.rows import PlannedSample
from megamm.data.planning.state import LoaderState
from megamm.data.shards.index import ShardIndex, load_index
from megamm.data.shards.places import Shard
from megamm.tokenizers.text import TextTokenizer
from megamm.train.data_report import read_report
from megamm.train.positions import Scale, find_place, sample_keys_digest
from megamm.train.run_folder import RunFolder
from megamm.train.unapplied import read_unapplied, told

_SAMPLE_COLUMNS = ("rank", "micro_step", "row", "position", "dataset", "key", "shard", "epoch", "tokens", "patches", "frames", "skipped")
_SIZE_COLUMNS = ("samples", "tokens", "patches", "frames", "cost")


@dataclass(frozen=True, slots=True)
class TracedRow:
    """One row of a step: whose it is (rank, micro-step and row of the micro-batch, all from 0) and what it takes."""

    rank: int
    micro_step: int
    row: int
    samples: int
    tokens: int
    patches: int
    frames: int
    cost: float


@dataclass(frozen=True, slots=True)
class TracedSample:
    """One sample of a step.

    Attributes:
        rank: Whose it is.
        micro_step: From 0; None for a sample that no row holds.
        row: Of the micro-batch, from 0; None for a sample that no row holds.
        position: In the stream of the run.
        dataset: Its dataset.
        key: Its key there.
        shard: The file that holds it.
        epoch: Pass over the dataset, from 0.
        tokens: As planned.
        patches: As planned.
        frames: Mel frames, as planned.
        skipped: Why it was skipped; empty where it was not, as far as the ledger knows.
    """

    rank: int
    micro_step: int | None
    row: int | None
    position: int
    dataset: str
    key: str
    shard: str
    epoch: int
    tokens: int
    patches: int
    frames: int
    skipped: str


@dataclass(frozen=True)
class StepTrace:
    """A step of a run.

    Attributes:
        step: Its number, from 1.
        scale: How its rows are dealt.
        rows: By rank, micro-step and row; rows that are left empty are not here.
        samples: In the same order, those that no row holds last.
        sample_keys: Digest of the keys as `metrics.jsonl` logs it.
        logged: What `metrics.jsonl` says of this step.
        unapplied: The line of `unapplied.jsonl`, where its update was not applied.
    """

    step: int
    scale: Scale
    rows: list[TracedRow]
    samples: list[TracedSample]
    sample_keys: str
    logged: dict[str, Any]
    unapplied: dict[str, Any] | None

    def of_rank(self, rank: int) -> StepTrace:
        """The same step with the rows and samples of one rank.

        Raises:
            ConfigError: There is no such rank.
        """
        if not 0 <= rank < self.scale.world_size:
            raise ConfigError(f"--rank {rank}: the step is dealt to {self.scale.world_size} ranks, the first is 0")
        rows, samples = ([one for one in of_all if one.rank == rank] for of_all in (self.rows, self.samples))
        return StepTrace(self.step, self.scale, rows, samples, self.sample_keys, self.logged, self.unapplied)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: what was logged, sizes by rank, sizes by row, samples."""
        scale = self.scale
        dealt = f"{scale.world_size} ranks × {scale.accumulation} micro-steps × {scale.micro_rows} rows"
        logged = self.logged.get("sample_keys", "nothing yet")
        keys = f"sample_keys {self.sample_keys} ({'as the run logged' if logged == self.sample_keys else f'the run logged {logged}'})"
        numbers = [f"{name} {self.logged[name]:.6g}" for name in ("loss", "grad_norm") if isinstance(self.logged.get(name), float)]
        samples = [[getattr(one, name) for name in _SAMPLE_COLUMNS] for one in self.samples]
        # Positions and counters are names here, not amounts.
        samples = [["-" if cell is None else str(cell) for cell in row] for row in samples]
        return [
            f"step {self.step}: {', '.join([dealt, *numbers, keys])}",
            *([told(self.unapplied)] if self.unapplied else []),
            "",
            *aligned(("rank", "rows", *_SIZE_COLUMNS, "skipped"), list(self._by_rank())),
            "",
            *aligned(("rank", "micro_step", "row", *_SIZE_COLUMNS), [tuple(asdict(row).values()) for row in self.rows]),
            "",
            *aligned(_SAMPLE_COLUMNS, samples),
        ]

    def _by_rank(self) -> Iterator[tuple[Any, ...]]:
        for rank in sorted({row.rank for row in self.rows}):
            own = [row for row in self.rows if row.rank == rank]
            num_skipped = sum(bool(one.skipped) for one in self.samples if one.rank == rank)
            yield rank, len(own), *(sum(getattr(row, name) for row in own) for name in _SIZE_COLUMNS), num_skipped


def trace_step(run: Path, step: int, *, world_size: int | None = None, of_data: bool = False) -> StepTrace:
    """The samples of a step, planned again from the place that the run noted before it.

    Args:
        run: The run folder.
        step: Number of the step, from 1; it need not have been run yet.
        world_size: Deal the rows to so many ranks; None for as many as the run had.
        of_data: The step is counted over the whole plan; so are those found that the run left out.

    Raises:
        ConfigError: No run, no such step, or rows that cannot be dealt to so many ranks.
        DataError: The run's shards are missing or changed, or its table of positions does not reach back to the step.
    """
    folder = RunFolder(run)
    recipe = load_resolved(folder.config)
    if not 1 <= step <= recipe.train.steps and not (of_data and step > 0):
        raise ConfigError(f"--step {step} is not a step of {run}: they are 1 to {recipe.train.steps}")
    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size {world_size}: give at least 1 rank")
    place = find_place(run, step, of_data=of_data)
    tokenizer = TextTokenizer.load(folder.tokenizer)
    plan = DataPlan.open(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer, seed=recipe.seed)
    state = LoaderState.from_position_json(place.position, plan.identity)
    planned = plan.next_step(replace(state, stretches=()) if of_data else state)
    while (planned.state.plan.num_steps if of_data else planned.state.step) < step:
        planned = plan.next_step(planned.state)
    scale = place.scale
    if world_size is not None and world_size != scale.world_size:
        scale = Scale(world_size, recipe.batch.micro_rows, resolve_accumulation(recipe.batch, world_size))
    reasons = {entry.position: entry.reason for entry in read_report(run).entries}
    names = _Names(plan)
    rows, samples = _deal(planned, names, scale, reasons)
    keys = sample_keys_digest(f"{sample.dataset}/{names.of(sample)[1]}" for row in planned.rows for sample in row.samples)
    logged = {} if of_data else _logged(run, step)
    unapplied = next((line for line in read_unapplied(run) if line["data_step"] == planned.state.plan.num_steps), None)
    return StepTrace(step, scale, rows, samples, keys, logged, unapplied)


def _logged(run: Path, step: int) -> dict[str, Any]:
    return next((line for line in read_json_lines(run / "metrics.jsonl") if line["step"] == step and "loss" in line), {})


class _Names:
    """Shards and keys of planned samples. State: the indexes that were opened."""

    def __init__(self, plan: DataPlan):
        self.plan = plan
        self._indexes: dict[Shard, ShardIndex] = {}

    def of(self, sample: PlannedSample) -> tuple[str, str]:
        """Name of the shard, and the key in it."""
        shard, number = self.plan.datasets[sample.dataset].locate(sample.index)
        if shard not in self._indexes:
            self._indexes[shard] = load_index(shard)
        return shard.name, self._indexes[shard].key(number)

    def traced(self, sample: PlannedSample, rank: int, place: tuple[int | None, int | None], skipped: str) -> TracedSample:
        """A sample at its place (micro-step and row) in the step."""
        shard, key = self.of(sample)
        sizes = sample.tokens, sample.patches, sample.frames
        return TracedSample(rank, *place, sample.position, sample.dataset, key, shard, sample.epoch, *sizes, skipped)


def _deal(planned: PlannedStep, names: _Names, scale: Scale, reasons: dict[int, str]) -> tuple[list[TracedRow], list[TracedSample]]:
    rows, samples = [], []
    for rank, micro_steps in enumerate(deal(planned.rows, scale.world_size, scale.micro_rows, scale.accumulation)):
        for micro_step, slots in enumerate(micro_steps):
            for number, row in enumerate(slots):
                if row is not None:
                    sizes = (sum(getattr(sample, name) for sample in row.samples) for name in ("tokens", "patches", "frames"))
                    rows.append(TracedRow(rank, micro_step, number, len(row.samples), *sizes, row.cost))
                    place = micro_step, number
                    samples += [names.traced(sample, rank, place, reasons.get(sample.position, "")) for sample in row.samples]
    for sample in planned.unfit:
        # The loader charges what no row holds by position, too.
        reason = reasons.get(sample.position) or names.plan.unfit_reason(sample)
        samples.append(names.traced(sample, sample.position % scale.world_size, (None, None), reason))
    return rows, samples
