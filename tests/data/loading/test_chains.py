"""Random chains of changes: a run that is stopped, re-scaled and changed again and again equals one that never was.

Most chains are planned alone, which takes milliseconds; some are read, decoded and collated by real loaders from real shards.
A chain is a pure function of its number, so a failing one can be run again.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import pytest
from webdataset import WebDataset

from megamm.config import Batching, Data, Dataset, WeightChange
from megamm.core.errors import DataError
from megamm.data.loading.loader import StepLoader
from megamm.data.planning.deal import deal, resolve_accumulation
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.state import LoaderState
from megamm.data.samples.datasets import ShardSet
from tests.data.conftest import MODEL
from tests.support.plans import CAPACITY, plan_of, shard_set

NUM_PLANNED_CHAINS = 120
NUM_READ_CHAINS = 10
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


@pytest.mark.parametrize("numbers", [range(start, start + 20) for start in range(0, NUM_PLANNED_CHAINS, 20)], ids=str)
def test_planned_chains_equal_an_unbroken_run(tokenizer, numbers):
    num_positions = 0
    for number in numbers:
        chain = Chain.draw(number)
        unbroken, saved = chain.plan(tokenizer), None
        state = unbroken.start()
        consumed, ledger, delivered = [], Counter(), Counter()
        for leg in chain.legs:
            plan = chain.plan(tokenizer)
            resumed = restarted(plan, saved, leg)
            state = state.excluding(leg.excluded) if leg.excluded else state
            for _ in range(leg.num_steps):
                expected, step = unbroken.next_step(state), plan.next_step(resumed)
                assert step.state == expected.state and step.unfit == expected.unfit
                assert [row.samples for row in step.rows] == [row.samples for row in expected.rows]
                read = read_by_ranks(step.rows, leg)
                excluded = {key for exclusion in resumed.exclusions for key in exclusion.keys}
                bad = [sample for sample in read if key_of(sample) in chain.corrupt | excluded] + list(step.unfit)
                ledger.update(bad)
                delivered.update(sample for sample in read if key_of(sample) not in chain.corrupt | excluded)
                consumed += [sample for row in step.rows for sample in row.samples] + list(step.unfit)
                place = LoaderState.from_position_json(json.loads(json.dumps(resumed.position_json())), plan.identity)
                assert [row.samples for row in plan.next_step(place).rows] == [row.samples for row in step.rows]
                state, resumed = expected.state, step.state
            saved = json.dumps(resumed.to_json())
        assert delivered + ledger == Counter(consumed) and max(Counter(consumed).values()) == 1
        check_positions(consumed, state, chain)
        check_passes(consumed, state, chain.sets)
        check_mixture(consumed, state)
        num_positions += len(consumed)
    assert num_positions > 100 * len(numbers)


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


def check_positions(consumed, state, chain) -> None:
    """Every position of the finished windows exactly once, and of the open one at most once."""
    positions = sorted(sample.position for sample in consumed)
    finished = state.plan.position
    assert [position for position in positions if position < finished] == list(range(finished))
    assert len(set(positions)) == len(positions) and positions[-1] < finished + chain.settings["window"]


def check_passes(consumed, state, sets) -> None:
    """Passes flow into each other: no sample comes twice in one, and over the finished windows all but the newest are complete."""
    for dataset in sets:
        passes: dict[int, list[int]] = {}
        for sample in consumed:
            if sample.dataset == dataset.name and sample.position < state.plan.position:
                passes.setdefault(sample.epoch, []).append(sample.index)
        assert sorted(passes) == list(range(len(passes)))
        for epoch, indices in passes.items():
            assert len(set(indices)) == len(indices)
            assert len(indices) == dataset.num_samples or epoch == len(passes) - 1
    assert len({(sample.dataset, sample.index, sample.epoch) for sample in consumed}) == len(consumed)


def check_mixture(consumed, state) -> None:
    """Of the finished windows under each weights, every dataset has its exact share to less than one sample."""
    segments = state.plan.segments
    # The newest weights may hold only from the next window on.
    ends = [min(one.start, state.plan.position) for one in segments[1:]] + [state.plan.position]
    for segment, end in zip(segments, ends, strict=True):
        counts = Counter(sample.dataset for sample in consumed if segment.start <= sample.position < end)
        for name, weight in zip(state.plan.names, segment.weights, strict=True):
            exact = Fraction(max(0, end - segment.start) * weight, sum(segment.weights))
            assert abs(counts[name] - exact) < 1


SCHEDULE = (WeightChange(4, {"words": 4.0}), WeightChange(9, {"digits": 0.0}))
EXCLUDED = {6: ("digits/d0-3", "text/t5-2"), 11: ("words/w1-4",)}
NUM_STEPS = 15


@pytest.fixture(scope="module")
def rotten(tmp_path_factory, corpus) -> Path:
    """The corpus with one byte of a picture and one of a sound changed after they were indexed."""
    root = Path(shutil.copytree(corpus, tmp_path_factory.mktemp("rotten") / "corpus"))
    for name, mark in (("digits/train-00001.tar", b"\xff\xd8\xff"), ("words/train-00000.tar", b"fLaC")):
        content = bytearray((root / name).read_bytes())
        content[content.index(mark) + 200] ^= 4
        (root / name).write_bytes(content)
    return root


def read_steps(plan: DataPlan, state: LoaderState, leg: Leg) -> list[tuple]:
    """Per step: planned keys in order, delivered keys, ledger, and the state after it; read by the ranks of a leg."""
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


@pytest.fixture(scope="module")
def unbroken(rotten, tokenizer) -> list[tuple]:
    """The run that was stopped only to exclude samples, on one rank."""
    steps, state = [], None
    plan = open_rotten(rotten, tokenizer, Batching(row_tokens=128, global_rows=6))
    for first, last in itertools.pairwise([0, *EXCLUDED, NUM_STEPS]):
        state = (plan.start() if state is None else state).excluding(EXCLUDED[first]) if first else plan.start()
        steps += read_steps(plan, state, Leg(last - first, 1, plan.batch))
        state = steps[-1][-1]
    return steps


def open_rotten(root: Path, tokenizer, batch: Batching, **changes) -> DataPlan:
    train = {name: Dataset(f"{name}/train-*.tar", weight) for name, weight in (("digits", 3.0), ("words", 1.0), ("text", 2.0))}
    data = Data(root=str(root), train=train, window=32, row_patches=48, row_frames=400, schedule=SCHEDULE, max_skipped_share=1.0)
    return DataPlan.open(replace(data, **changes), batch, model=MODEL, tokenizer=tokenizer, seed=5)


@pytest.mark.parametrize("number", range(NUM_READ_CHAINS))
def test_read_chains_equal_an_unbroken_run(rotten, tokenizer, unbroken, number):
    rng = random.Random(number)
    done, saved = 0, None
    while done < NUM_STEPS:
        world_size, micro_rows = rng.randint(1, 5), rng.randint(1, 3)
        limit = next(step for step in (*EXCLUDED, NUM_STEPS) if step > done)
        batch = Batching(row_tokens=128, global_rows=6, micro_rows=micro_rows)
        leg = Leg(rng.randint(1, limit - done), world_size, batch, EXCLUDED.get(done, ()))
        workers, prefetch = rng.randint(1, 3), rng.randint(1, 4)
        plan = open_rotten(rotten, tokenizer, batch, decode_workers=workers, prefetch_steps=prefetch)
        steps = read_steps(plan, restarted(plan, saved, leg), leg)
        assert steps == unbroken[done : done + leg.num_steps]
        done, saved = done + leg.num_steps, json.dumps(steps[-1][-1].to_json())


def test_read_and_ledger_are_what_was_planned(unbroken):
    skipped = [entry for _, _, entries, _ in unbroken for entry in entries]
    for keys, delivered, entries, _ in unbroken:
        assert Counter(keys) == Counter(delivered) + Counter(key for _, key, reason in entries if "a row holds" not in reason)
    assert {"digits/d1-0", "words/w0-0"} <= {key for _, key, reason in skipped if "changed since they were indexed" in reason}
    assert {key for _, key, reason in skipped if reason == "excluded"} & {key for keys in EXCLUDED.values() for key in keys}
    # From step 9 and the next whole window on there are no more digits.
    start = unbroken[-1][-1].plan.segments[-1].start
    assert start < unbroken[-3][-1].plan.position
    assert not any(key.startswith("digits/") for keys, _, _, _ in unbroken[-2:] for key in keys)


def test_a_vanilla_reader_finds_the_samples_of_one_pass(rotten, tokenizer):
    """Plan until every dataset was drawn once: first passes hold exactly what webdataset reads from the same shards."""
    plan = open_rotten(rotten, tokenizer, Batching(row_tokens=128, global_rows=7), schedule=())
    state, first = plan.start(), {name: set() for name in plan.datasets}
    while any(len(indices) < plan.datasets[name].num_samples for name, indices in first.items()):
        step = plan.next_step(state)
        for sample in itertools.chain(step.unfit, *(row.samples for row in step.rows)):
            if sample.epoch == 0:
                assert sample.index not in first[sample.dataset]
                first[sample.dataset].add(sample.index)
        state = step.state
    with StepLoader(plan) as loader:
        planned = set(next(loader).keys)
    for name, dataset in plan.datasets.items():
        found = [sample["__key__"] for tar in dataset.tars for sample in WebDataset(str(tar), shardshuffle=False)]
        assert len(found) == len(set(found)) == len(first[name])
        assert {key.removeprefix(f"{name}/") for key in planned if key.startswith(f"{name}/")} <= set(found)


def test_data_of_which_nothing_fits_end_a_chain_at_any_scale(tokenizer):
    plan = plan_of([shard_set("a", [50], tokens=CAPACITY[0] + 1)], tokenizer, num_rows=4)
    with pytest.raises(DataError, match="fits a row"):
        plan.next_step(plan.start())
