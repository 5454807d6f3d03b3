"""Random chains of a run: stretches at changing scales, drawn from a number, so that a failing one can be run again."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from megamm.config import Batching, WeightChange
from megamm.data.planning.deal import deal, resolve_accumulation
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.state import LoaderState
from megamm.data.samples.datasets import ShardSet
from tests.support.plans import CAPACITY, plan_of, shard_set

WEIGHTS = [0.5, 1.0, 2.0, 3.7]


@dataclass(frozen=True)
class Leg:
    """A stretch of a run at one scale; `excluded` are kept out from its first step on."""

    num_steps: int
    world_size: int
    batch: Batching
    excluded: tuple[str, ...] = ()


def draw_legs(rng: random.Random, num_steps: int, num_rows: int, keys: list[str]) -> list[Leg]:
    """Legs that make up `num_steps`; in one of three chains every leg is one step."""
    legs, is_every_step = [], rng.random() < 0.3
    while num_steps:
        length = 1 if is_every_step else rng.randint(1, min(6, num_steps))
        world_size, micro_rows = rng.randint(1, min(5, num_rows)), rng.randint(1, 3)
        accumulation = num_rows // (world_size * micro_rows) if num_rows % (world_size * micro_rows) == 0 and rng.random() < 0.5 else 0
        batch = Batching(row_tokens=CAPACITY[0], global_rows=num_rows, micro_rows=micro_rows, accumulation=accumulation)
        excluded = tuple(rng.sample(keys, min(len(keys), rng.randint(1, 3)))) if rng.random() < 0.3 else ()
        legs.append(Leg(length, world_size, batch, excluded))
        num_steps -= length
    return legs


def restarted(plan: DataPlan, saved: str | None, leg: Leg) -> LoaderState:
    """The state that a leg begins with, as a run that is resumed makes it."""
    state = plan.start() if saved is None else plan.resume(LoaderState.from_json(json.loads(saved)))
    return state.excluding(leg.excluded) if leg.excluded else state


@dataclass(frozen=True)
class Chain:
    """A plan without files, its legs, and which samples will turn out to be corrupt."""

    sets: list[ShardSet]
    weights: list[float]
    settings: dict
    num_rows: int
    legs: list[Leg]
    corrupt: frozenset[str]

    @classmethod
    def draw(cls, number: int) -> Chain:
        rng = random.Random(number)
        sets = [
            shard_set(
                f"d{each}", [rng.randint(0, 14) for _ in range(rng.randint(0, 4))] + [rng.randint(6, 14)], seed=rng.random().__hash__()
            )
            for each in range(rng.randint(1, 4))
        ]
        keys = [f"{one.name}/{index}" for one in sets for index in range(one.num_samples)]
        weights = [rng.choice([0.0, *WEIGHTS]) for _ in sets[1:]] + [rng.choice(WEIGHTS)]
        steps = sorted(rng.sample(range(1, 16), rng.randint(0, 3)))
        # The last dataset is never drawn down to nothing, so that something always is.
        changes = [{one.name: rng.choice([0.0, *WEIGHTS]) for one in rng.sample(sets[:-1], rng.randint(0, len(sets) - 1))} for _ in steps]
        settings = {
            "window": rng.choice([7, 16, 40, 64]),
            "shuffle_block": rng.choice([1, 1, 3, 5]),
            "shuffle_window": rng.randint(1, 4),
            "schedule": tuple(WeightChange(step, change) for step, change in zip(steps, changes, strict=True) if change),
            "seed": rng.randint(0, 9),
        }
        num_rows = rng.randint(1, 9)
        legs = draw_legs(rng, rng.randint(8, 18), num_rows, keys)
        return cls(sets, weights, settings, num_rows, legs, frozenset(rng.sample(keys, len(keys) // 10)))

    def plan(self, tokenizer) -> DataPlan:
        """Opened anew, as every restart does."""
        return plan_of(self.sets, tokenizer, weights=self.weights, num_rows=self.num_rows, **self.settings)


def key_of(sample) -> str:
    return f"{sample.dataset}/{sample.index}"


def read_by_ranks(rows, leg: Leg) -> list:
    """All samples that the ranks of a leg read in a step; checks that they do the same number of micro-steps and fit their rows."""
    accumulation = resolve_accumulation(leg.batch, leg.world_size)
    hands = deal(rows, leg.world_size, leg.batch.micro_rows, accumulation)
    assert {len(hand) for hand in hands} == {accumulation} and {len(step) for hand in hands for step in hand} == {leg.batch.micro_rows}
    assert all(any(row is not None for step in hand for row in step) for hand in hands)
    dealt = [row for hand in hands for step in hand for row in step if row is not None]
    assert len(dealt) == len(rows)
    for row in dealt:
        sizes = zip(*((sample.tokens, sample.patches, sample.frames) for sample in row.samples), strict=True)
        assert all(sum(size) <= limit for size, limit in zip(sizes, CAPACITY, strict=True))
    return [sample for row in dealt for sample in row.samples]
