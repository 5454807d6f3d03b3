"""Data that a run leaves out: what comes later does not shift, and the state alone says what was left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megamm.config import WeightChange
from megamm.core.errors import ConfigError
from megamm.data.planning.state import LoaderState
from tests.support.plans import plan_of, shard_set

SCHEDULE = (WeightChange(6, {"a": 3.0}),)


@pytest.fixture
def plan(tokenizer):
    sets = [shard_set(name, [size], seed=size) for name, size in (("a", 70), ("b", 50))]
    return plan_of(sets, tokenizer, window=32, num_rows=3, schedule=SCHEDULE)


def walk(plan, state, num_steps):
    """Each step's samples and unfit samples, and the state after it."""
    for _ in range(num_steps):
        step = plan.next_step(state)
        state = step.state
        yield [sample for row in step.rows for sample in row.samples], step.unfit, state


def test_what_follows_a_stretch_is_what_followed_it_in_the_unbroken_plan(plan):
    unbroken = list(walk(plan, plan.start(), 16))
    broken = list(walk(plan, plan.leave_out(plan.start(), 4, 9, reason="rotten"), 10))
    assert [samples for samples, _, _ in broken] == [samples for samples, _, _ in unbroken[:3] + unbroken[9:]]
    assert [state.step for *_, state in broken] == list(range(1, 11))
    # The weights that step 6 brings hold from the same position on, although that step is left out.
    assert broken[-1][2].plan == unbroken[-1][2].plan and len(broken[-1][2].plan.segments) == 2
    (stretch,) = broken[-1][2].stretches
    before, after = unbroken[2][2].plan, unbroken[8][2].plan
    assert (stretch.start, stretch.end) == ((before.position, before.row), (after.position, after.row))


def test_every_position_is_delivered_unfit_or_in_the_stretch(plan):
    unbroken = list(walk(plan, plan.start(), 16))
    broken = list(walk(plan, plan.leave_out(plan.start(), 4, 9, reason="rotten"), 10))
    seen = [sample.position for samples, unfit, _ in broken for sample in (*samples, *unfit)]
    left_out = [sample.position for samples, _, _ in unbroken[3:9] for sample in samples]
    everything = [sample.position for samples, unfit, _ in unbroken for sample in (*samples, *unfit)]
    assert len(seen) == len(set(seen)) and left_out
    assert sorted(seen + left_out) == sorted(everything)


@pytest.mark.parametrize("done", range(10))
def test_a_run_resumes_and_is_sought_before_after_and_beside_a_stretch(plan, done):
    state = plan.leave_out(plan.leave_out(plan.start(), 4, 5, reason="one"), 6, 9, reason="two")
    broken = list(walk(plan, state, 10))
    state = state if not done else broken[done - 1][2]
    resumed = plan.resume(LoaderState.from_json(json.loads(json.dumps(state.to_json()))))
    assert resumed == state and list(walk(plan, resumed, 10 - done)) == broken[done:]
    sought = LoaderState.from_position_json(json.loads(json.dumps(state.position_json())), plan.identity)
    assert [samples for samples, _, _ in walk(plan, sought, 10 - done)] == [samples for samples, _, _ in broken[done:]]
    assert not state.position_json()["stretches"] or done < 4


def test_only_data_to_come_can_be_left_out(plan):
    *_, (_, _, state) = walk(plan, plan.start(), 3)
    for first, last in ((3, 5), (5, 4), (0, 0)):
        with pytest.raises(ConfigError, match=f"data of steps {first} to {last} cannot be left out after step 3; name later steps"):
            plan.leave_out(state, first, last, reason="x")


def test_a_stretch_means_nothing_under_other_data(plan, tokenizer):
    """Its steps were counted in the old plan: whoever mended the data and accepts the change trains on them."""
    state = plan.leave_out(plan.start(), 2, 3, reason="rotten")
    sets = [shard_set(name, [size], seed=size, shards="mended") for name, size in (("a", 70), ("b", 50))]
    mended = plan_of(sets, tokenizer, window=32, num_rows=3, schedule=SCHEDULE)
    moved = mended.resume(state, accept_change=True)
    assert moved.stretches == state.stretches
    assert [one for *one, _ in walk(mended, moved, 5)] == [one for *one, _ in walk(mended, replace(moved, stretches=()), 5)]
