"""The plan as a pure function: everything once an epoch, capacities kept, any place found at once, any size."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megamm.core.errors import DataError
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.rows import PlannedSample, RowCosts
from megamm.data.planning.state import LoaderState
from megamm.data.samples.datasets import ShardSet
from tests.support.plans import CAPACITY, plan_of, shard_set


def first_rows(plan: DataPlan) -> list[tuple[PlannedSample, ...]]:
    return [row.samples for row in plan.next_step(plan.start()).rows]


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0)


@given(
    st.lists(st.tuples(SIZES, st.sampled_from([0.5, 1.0, 2.0, 3.7])), min_size=1, max_size=3),
    st.integers(1, 90),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 17),
)
@settings(max_examples=60)
def test_every_position_is_consumed_once_and_no_row_overflows(tokenizer, datasets, window, block, shuffle_window, num_rows):
    sets = [shard_set(f"d{number}", sizes) for number, (sizes, _) in enumerate(datasets)]
    weights = [weight for _, weight in datasets]
    assume(any((one.lengths <= CAPACITY).all(axis=-1).any() for one in sets))
    plan = plan_of(sets, tokenizer, weights=weights, window=window, shuffle_block=block, shuffle_window=shuffle_window, num_rows=num_rows)
    state, positions, seen = plan.start(), [], set()
    for _ in range(8):
        step = plan.next_step(state)
        assert len(step.rows) == num_rows
        for row in step.rows:
            samples = row.samples
            assert samples and [sample.position for sample in samples] == sorted(sample.position for sample in samples)
            for total, capacity in zip(zip(*[(s.tokens, s.patches, s.frames) for s in samples], strict=True), CAPACITY, strict=True):
                assert sum(total) <= capacity
        for sample in (*step.unfit, *(sample for row in step.rows for sample in row.samples)):
            positions.append(sample.position)
            assert (sample.dataset, sample.index, sample.epoch) not in seen
            seen.add((sample.dataset, sample.index, sample.epoch))
        state = step.state
    finished = state.plan.position
    assert sorted(position for position in positions if position < finished) == list(range(finished))
    assert len(positions) == len(set(positions))


@given(st.integers(1, 30), st.integers(0, 200), st.integers(1, 20))
@settings(max_examples=30)
def test_steps_of_any_size_are_cuts_of_one_stream_of_rows(tokenizer, first, seed, second):
    """What rows there are does not depend on how many are taken at once."""
    whole, one, two = (plan_of([shard_set("a", [50, 60])], tokenizer, seed=seed, num_rows=num) for num in (first + second, first, second))
    whole = whole.next_step(whole.start())
    one = one.next_step(one.start())
    two = two.next_step(one.state)
    assert [row.samples for row in (*one.rows, *two.rows)] == [row.samples for row in whole.rows]
    assert one.unfit + two.unfit == whole.unfit and replace(two.state.plan, num_steps=1) == whole.state.plan


def test_epochs_are_complete_and_differ(tokenizer):
    plan = plan_of([shard_set("a", [30, 0, 34], tokens=10)], tokenizer, num_rows=20)
    samples = [sample for row in first_rows(plan) for sample in row]
    orders = {epoch: [s.index for s in sorted(samples, key=lambda s: s.position) if s.epoch == epoch] for epoch in (0, 1)}
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(64))
    assert orders[0] != orders[1]


def test_rows_are_not_taken_from_long_to_short(tokenizer):
    """Packing opens rows for the largest samples first; their cost must not fall along the window."""
    plan = plan_of([shard_set("a", [4096])], tokenizer, window=2048, num_rows=300)
    costs = [row.cost for row in plan.next_step(plan.start()).rows]
    assert abs(np.corrcoef(np.arange(300), costs)[0, 1]) < 0.2


def test_steps_hold_every_dataset_in_nearly_its_share(tokenizer):
    """Three datasets, each of its own length: over steps of 4 rows their shares vary less than if samples were drawn at random."""
    sets = [shard_set(name, [5000], tokens=tokens) for name, tokens in (("long", 12), ("middle", 5), ("short", 2))]
    plan = plan_of(sets, tokenizer, window=512, num_rows=4)
    state, counts = plan.start(), []
    for _ in range(150):
        step = plan.next_step(state)
        state = step.state
        found = [sample.dataset for row in step.rows for sample in row.samples]
        counts.append([found.count(name) for name in plan.datasets])
    sizes = np.sum(counts, axis=1)
    variance = ((np.array(counts) / sizes[:, None] - 1 / 3) ** 2).mean(axis=0)
    assert variance.max() < (1 / 3 * 2 / 3) * (1 / sizes).mean()


def test_every_stretch_of_rows_costs_about_the_same(tokenizer):
    """Rows of one long document and rows of many short ones come mixed, however many rows a step has."""
    lengths = np.where(np.random.default_rng(0).random(4096) < 0.05, 90, 10)
    dataset = shard_set("a", [4096])
    dataset = replace(dataset, lengths=np.stack([lengths, 0 * lengths, 0 * lengths], axis=1)[:, None].astype(np.int32))
    costs = RowCosts(token_pair=0.1)
    plan = plan_of([dataset], tokenizer, window=4096, num_rows=400, costs=costs)
    rows = np.array([row.cost for row in plan.next_step(plan.start()).rows])
    shuffled = np.random.default_rng(1).permutation(rows)
    for stretch in (4, 10, 40):
        sums, at_random = (each.reshape(-1, stretch).sum(axis=1).std() for each in (rows, shuffled))
        assert sums < 0.6 * at_random


def test_names_not_their_order_in_the_recipe_decide(tokenizer):
    """An archived recipe comes back with sorted keys: the plan must be the same one."""
    a, b = shard_set("a", [50]), shard_set("b", [70])
    one, two = plan_of([a, b], tokenizer, weights=[2.0, 1.0]), plan_of([b, a], tokenizer, weights=[1.0, 2.0])
    assert one.fingerprint == two.fingerprint
    assert first_rows(one) == first_rows(two)


def test_identity_names_everything_that_the_rows_depend_on(tokenizer):
    base = plan_of([shard_set("a", [50])], tokenizer)
    others = [
        plan_of([shard_set("a", [50])], tokenizer, seed=1),
        plan_of([shard_set("b", [50])], tokenizer),
        *(
            plan_of([shard_set("a", [50])], tokenizer, **{name: 7})
            for name in ("window", "shuffle_block", "shuffle_window", "row_patches", "row_frames")
        ),
        plan_of([replace(shard_set("a", [50]), digest="other")], tokenizer),
        plan_of([shard_set("a", [50], shards="other")], tokenizer),
        plan_of([shard_set("a", [50])], tokenizer, costs=RowCosts(patch=1.0)),
    ]
    assert len({plan.fingerprint for plan in (base, *others)}) == len(others) + 1
    # What only changes how fast and on how many ranks it runs is not part of the plan.
    same = plan_of([shard_set("a", [50])], tokenizer, decode_workers=9, prefetch_steps=9, prefetch_bytes=9)
    assert same.fingerprint == base.fingerprint


def test_data_that_fit_no_row_are_an_error_not_an_endless_search(tokenizer):
    plan = plan_of([shard_set("a", [20_000], tokens=101)], tokenizer, window=1000, num_rows=1)
    with pytest.raises(DataError, match=r"no sample among 100000 positions fits a row: takes 101 tokens.*a row holds 100"):
        plan.next_step(plan.start())


def test_small_windows_without_a_sample_that_fits_are_no_reason_to_stop(tokenizer):
    """At a window of one position a stretch of unfit samples is as many empty windows."""
    dataset = shard_set("a", [500], tokens=101)
    dataset.lengths[123] = 10, 0, 0
    plan = plan_of([dataset], tokenizer, window=1, num_rows=3)
    step = plan.next_step(plan.start())
    assert [sample.index for row in step.rows for sample in row.samples] == [123] * 3
    assert sorted([*(one.position for one in step.unfit), *(row.samples[0].position for row in step.rows)]) == list(
        range(step.state.plan.position)
    )


def test_a_billion_samples_are_planned_anywhere_at_once(tokenizer):
    lengths = np.broadcast_to(np.array([10, 0, 0], dtype=np.int32), (10**9, 1, 3))
    starts = np.arange(100_001) * 10_000
    dataset = ShardSet("a", tuple(map(Path, map(str, range(100_000)))), starts, "digest", ("text",), "key", lengths, "shards")

    def plan_three_places() -> None:
        plan = plan_of([dataset], tokenizer, shuffle_block=16, window=2048, num_rows=256)
        state = plan.start()
        for window in (0, 10**6, 4 * 10**5):
            assert len(plan.next_step(replace(state, plan=replace(state.plan, position=window * 2048, row=3))).rows) == 256

    started = time.process_time()
    plan_three_places()
    assert time.process_time() - started < 1
    tracemalloc.start()
    try:
        plan_three_places()
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_window_of_many_passes_is_planned_like_any_other(tokenizer):
    """One sample, drawn 8192 times a window: not a call a pass."""
    plan = plan_of([shard_set("a", [1], tokens=10)], tokenizer, window=8192, num_rows=800)
    plan.next_step(plan.start())
    started = time.process_time()
    later = replace(plan.start(), plan=replace(plan.start().plan, position=8192))
    assert plan.next_step(later).rows[0].samples[0].epoch >= 8192
    assert time.process_time() - started < 0.25


def test_state_is_canonical_and_versioned(tokenizer):
    plan = plan_of([shard_set("a", [50])], tokenizer)
    state = plan.start().excluding(["a/x", "a/b"])
    value = state.to_json()
    assert LoaderState.from_json(value) == state and LoaderState.from_json(value).to_json() == value
    with pytest.raises(DataError, match="version 99"):
        LoaderState.from_json({**value, "version": 99})
    with pytest.raises(DataError, match="cannot be read"):
        LoaderState.from_json({**value, "weights": [{}]})
    with pytest.raises(DataError, match="cannot be read"):
        LoaderState.from_json({name: part for name, part in value.items() if name != "row"})
