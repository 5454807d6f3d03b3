"""Planning a step: how fast, how full its rows, how even its ranks; under the settings of the recipe `1b`, with lengths drawn at random."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.results import Row, measured
from megamm.config import Batching, Data, Dataset, load_recipe
from megamm.data.media.features import MediaRules
from megamm.data.planning.deal import deal, resolve_accumulation
from megamm.data.planning.plan import DataPlan, PlannedStep
from megamm.data.samples.datasets import ShardSet
from megamm.tokenizers import text
from megamm.tokenizers.text import TextTokenizer

NUM_RANKS = 64
_SAMPLES_A_SHARD = 10_000


def planning_rows(*, num_steps: int, num_rounds: int) -> list[Row]:
    """Speed, fill and balance.

    Args:
        num_steps: Steps of a round.
        num_rounds: Rounds, each from another seed.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizer(Path(folder))
    recipe = load_recipe("1b")
    mixture = {"images": pictures, "speech": sounds, "text": texts}
    sets = [synthetic_set(name, lengths(300_000)) for name, lengths in mixture.items()]
    long_and_short = [synthetic_set("text", texts(300_000))]
    media, plain = [], []
    for seed in range(num_rounds):
        media.append(_run(DataPlan(sets, recipe.data, recipe.batch, rules=_rules(recipe), tokenizer=tokenizer, seed=seed), num_steps))
        only_text = Data(train={"text": Dataset("text")}, window=recipe.data.window)
        plain.append(
            _run(DataPlan(long_and_short, only_text, recipe.batch, rules=_rules(recipe), tokenizer=tokenizer, seed=seed), num_steps)
        )
    batch = recipe.batch
    where = f"rows of {batch.row_tokens} tokens, {recipe.data.row_patches} patches, {recipe.data.row_frames} frames"
    rows = [
        measured(
            "planning: samples a core",
            [one.samples_per_second for one in media],
            "samples/s",
            goal=">= 1e6",
            peer=f"window {recipe.data.window}, with media; {where}",
        ),
        measured("planning: fill, media and text", [one.fill for one in media], "of tokens", goal=">= 0.98", peer=where),
        measured(
            "planning: fill, short and long texts",
            [one.fill for one in plain],
            "of tokens",
            goal=">= 0.98",
            peer="2 to 4000 tokens, median 250",
        ),
    ]
    for num_rows in (batch.global_rows, 4 * batch.global_rows):
        wider = replace(batch, global_rows=num_rows)
        plan = DataPlan(sets, recipe.data, wider, rules=_rules(recipe), tokenizer=tokenizer, seed=0)
        rows.append(_balance_row(plan, wider, num_steps=max(4, num_steps // 4)))
    return rows


@dataclass(frozen=True, slots=True)
class _Planned:
    samples_per_second: float
    fill: float


def _run(plan: DataPlan, num_steps: int) -> _Planned:
    state = plan.next_step(plan.start()).state  # imports and tables
    first, steps = state.plan.position, []
    started = time.process_time()
    for _ in range(num_steps):
        steps.append(plan.next_step(state))
        state = steps[-1].state
    spent = time.process_time() - started
    return _Planned((state.plan.position - first) / spent, _fill(steps, plan.batch.row_tokens))


def _fill(steps: Sequence[PlannedStep], row_tokens: int) -> float:
    rows = [row for step in steps for row in step.rows]
    used = 0
    for row in rows:
        window = row.window
        used += int(window.lengths[window.members[window.starts[row.number] : window.starts[row.number + 1]], 0].sum())
    return used / (len(rows) * row_tokens)


def _balance_row(plan: DataPlan, batch: Batching, *, num_steps: int) -> Row:
    """The costliest rank against the mean one, step by step."""
    accumulation = resolve_accumulation(batch, NUM_RANKS)
    ratios, state = [], plan.start()
    for _ in range(num_steps):
        step = plan.next_step(state)
        state = step.state
        hands = deal(step.rows, NUM_RANKS, batch.micro_rows, accumulation)
        costs = np.array([sum(row.cost for slots in hand for row in slots if row is not None) for hand in hands])
        ratios.append(float(costs.max() / costs.mean()))
    name = f"planning: costliest rank / mean, {batch.global_rows // NUM_RANKS} rows a rank"
    return measured(name, ratios, "×", goal="<= 1.05", peer=f"{NUM_RANKS} simulated ranks, {num_steps} steps")


def synthetic_set(name: str, lengths: np.ndarray) -> ShardSet:
    """A dataset without files: int[N, 3] tokens, patches and frames."""
    starts = np.append(np.arange(0, len(lengths), _SAMPLES_A_SHARD), len(lengths))
    tars = tuple(Path(f"{name}-{shard:06}.tar") for shard in range(len(starts) - 1))
    return ShardSet(name, tars, starts, "digest", ("text",), "key", lengths[:, None], "shards")


def small_tokenizer(folder: Path) -> TextTokenizer:
    """Plans are made for a tokenizer, whichever it is."""
    from megamm.config import Tokenizer

    return text.train(["words of a small tokenizer"] * 8, Tokenizer(text_size=300, location_bins=0), folder)


def texts(num_samples: int) -> np.ndarray:
    """int32[N, 3]: documents of 2 to 4000 tokens, half of them below 250."""
    tokens = np.random.default_rng(1).lognormal(np.log(250), 1.3, num_samples).clip(2, 4000)
    return _columns(tokens, 0, 0)


def pictures(num_samples: int) -> np.ndarray:
    """int32[N, 3]: 400 to 1024 patches of which four make a token, and a caption."""
    rng = np.random.default_rng(2)
    patches = 4 * rng.integers(100, 257, num_samples)
    return _columns(patches // 4 + rng.integers(10, 120, num_samples), patches, 0)


def sounds(num_samples: int) -> np.ndarray:
    """int32[N, 3]: 1 to 30 seconds of 100 frames and 13 tokens, and what was said."""
    rng = np.random.default_rng(3)
    seconds = rng.uniform(1, 30, num_samples)
    return _columns(13 * seconds + 6 * seconds + 8, 0, 100 * seconds)


def _columns(tokens, patches, frames) -> np.ndarray:
    return np.stack(np.broadcast_arrays(tokens, patches, frames), axis=1).astype(np.int32)


def _rules(recipe) -> MediaRules:
    return MediaRules.of(recipe.model, recipe.data)
