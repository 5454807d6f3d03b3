"""Random chains of changes: a run that is stopped, re-scaled and changed again and again equals one that never was.

Most chains are planned alone, which takes milliseconds; some are read, decoded and collated by real loaders from real shards.
A chain is a pure function of its number, so a failing one can be run again.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from webdataset import WebDataset

from megamm.config import Batching
from megamm.core.errors import DataError
from megamm.data.loading.loader import StepLoader
from megamm.data.planning.state import LoaderState
from tests.support.chains import Chain, key_of, read_by_ranks, restarted
from tests.support.plans import CAPACITY, plan_of, shard_set
from tests.support.read_chains import EXCLUDED, ReadStep, draw_read_legs, open_rotten, read_steps, read_unbroken, rotten_copy

NUM_PLANNED_CHAINS = 120
NUM_READ_CHAINS = 10


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


@pytest.fixture(scope="module")
def rotten(tmp_path_factory, corpus) -> Path:
    return rotten_copy(corpus, tmp_path_factory.mktemp("rotten") / "corpus")


@pytest.fixture(scope="module")
def unbroken(rotten, tokenizer) -> list[ReadStep]:
    return read_unbroken(rotten, tokenizer)


@pytest.mark.parametrize("number", range(NUM_READ_CHAINS))
def test_read_chains_equal_an_unbroken_run(rotten, tokenizer, unbroken, number):
    done, saved = 0, None
    for leg, changes in draw_read_legs(number):
        plan = open_rotten(rotten, tokenizer, leg.batch, **changes)
        steps = read_steps(plan, restarted(plan, saved, leg), leg)
        assert steps == unbroken[done : done + leg.num_steps]
        done, saved = done + leg.num_steps, json.dumps(steps[-1][-1].to_json())
    assert done == len(unbroken)


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
