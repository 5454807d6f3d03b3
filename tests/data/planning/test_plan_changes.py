"""What may change while a run goes on: weights by schedule or by hand, and, where accepted, data and settings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from megamm.config import Dataset, WeightChange
from megamm.core.errors import ConfigError, DataError
from megamm.data.planning.state import DataChange, LoaderState, Pass
from tests.support.plans import plan_of, shard_set

SCHEDULE = (WeightChange(3, {"a": 3.0}), WeightChange(6, {"b": 0.0, "c": 1.0}))


def two_and_one(tokenizer, **changes):
    """Three datasets of which `c` comes later."""
    sets = [shard_set(name, [size], tokens=10) for name, size in (("a", 70), ("b", 50), ("c", 30))]
    return plan_of(sets, tokenizer, weights=changes.pop("weights", [1.0, 1.0, 0.0]), window=32, num_rows=2, **changes)


def walk(plan, state, num_steps):
    """Ordered (position, dataset, index, epoch) of each step, and the state after it."""
    for _ in range(num_steps):
        step = plan.next_step(state)
        state = step.state
        yield [(one.position, one.dataset, one.index, one.epoch) for row in step.rows for one in row.samples], state


def test_scheduled_weights_hold_from_the_next_whole_window_on(tokenizer):
    plan = two_and_one(tokenizer, schedule=SCHEDULE)
    steps = list(walk(plan, plan.start(), 20))
    segments = steps[-1][1].plan.segments
    assert [segment.weights for segment in segments] == [(1, 1, 0), (3, 1, 0), (3, 0, 1)]
    for segment, step in zip(segments[1:], (3, 6), strict=True):
        before = steps[step - 2][1].plan
        assert segment.start == before.position + (before.row > 0) * 32
    samples = sorted(sample for keys, _ in steps for sample in keys)
    for segment, end in zip(segments, [*(one.start for one in segments[1:]), steps[-1][1].plan.position], strict=True):
        counts = Counter("abc".index(name) for position, name, _, _ in samples if segment.start <= position < end)
        for number, weight in enumerate(segment.weights):
            assert abs(counts[number] - Fraction((end - segment.start) * weight, sum(segment.weights))) < 1


def test_a_scheduled_run_can_be_resumed_and_sought_at_every_step(tokenizer):
    plan = two_and_one(tokenizer, schedule=SCHEDULE)
    steps = list(walk(plan, plan.start(), 12))
    for done in range(11):
        again = two_and_one(tokenizer, schedule=SCHEDULE)
        resumed = again.resume(LoaderState.from_json(json.loads(json.dumps(steps[done][1].to_json()))))
        assert resumed == steps[done][1] and next(walk(again, resumed, 1)) == steps[done + 1]
        place = json.loads(json.dumps(steps[done][1].position_json()))
        sought = LoaderState.from_position_json(place, plan.identity)
        assert [keys for keys, _ in walk(plan, sought, 11 - done)] == [keys for keys, _ in steps[done + 1 :]]
        assert len(json.dumps(place)) < 600


def test_the_state_decides_not_the_recipe_that_looks_it_up(tokenizer):
    """A step of long ago is found although weights and schedule were changed since."""
    plan, other = two_and_one(tokenizer, schedule=SCHEDULE), two_and_one(tokenizer, weights=[5.0, 1.0, 2.0])
    assert list(walk(plan, plan.start(), 9)) == list(walk(other, plan.start(), 9))


def test_weights_changed_by_hand_are_recorded_on_resume(tokenizer):
    plan = two_and_one(tokenizer)
    state = list(walk(plan, plan.start(), 3))[-1][1]
    changed = two_and_one(tokenizer, weights=[1.0, 0.0, 1.0], schedule=(WeightChange(2, {"a": 4.0}), WeightChange(9, {"b": 1.0})))
    resumed = changed.resume(state)
    assert [segment.weights for segment in resumed.plan.segments] == [(1, 1, 0), (4, 0, 1)]
    assert [(one.step, one.weights) for one in resumed.plan.schedule] == [(9, (4, 1, 1))]
    assert changed.resume(resumed) == resumed


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            (WeightChange(5, {"a": 1.0}), WeightChange(5, {"b": 1.0})),
            r"data\.schedule has step 5 after step 5; list its entries by ascending",
        ),
        ((WeightChange(5, {"aa": 1.0}),), r"data\.schedule at step 5 names 'aa', which is not in data\.train; did you mean 'a'\?"),
        ((WeightChange(5, {"a": 0.0, "b": 0.0}),), r"data weights \[0\.0, 0\.0, 0\.0\] draw nothing"),
    ],
)
def test_impossible_schedules_are_refused(tokenizer, schedule, message):
    with pytest.raises(ConfigError, match=message):
        two_and_one(tokenizer, schedule=schedule)


def test_other_data_are_refused_unless_accepted(tokenizer):
    old = plan_of([shard_set("a", [50], tokens=10)], tokenizer)
    new = plan_of([shard_set("a", [50, 20], tokens=10, shards="more")], tokenizer)
    state = list(walk(old, old.start(), 1))[-1][1]
    with pytest.raises(DataError, match=r"samples of a was 50, is 70; shards of a was shards, is more; .*--accept-data-change"):
        new.resume(state)
    accepted = new.resume(state, accept_change=True)
    names = ("samples of a", "shards of a")
    left = (state.plan.position, state.plan.row)
    assert accepted.changes == (DataChange(1, accepted.plan.position, *left, old.fingerprint, new.fingerprint, names),)
    assert accepted.identity == new.identity and accepted.step == 1
    assert LoaderState.from_json(json.loads(json.dumps(accepted.to_json()))) == accepted
    assert new.resume(accepted) == accepted == new.resume(accepted, accept_change=True)
    with pytest.raises(DataError, match="step 1 was planned from other data or settings"):
        LoaderState.from_position_json(state.position_json(), new.identity)


def test_after_an_accepted_change_a_changed_dataset_begins_anew_and_the_others_go_on(tokenizer):
    kept = shard_set("kept", [90], tokens=10)
    old = plan_of([kept, shard_set("gone", [40], tokens=10), shard_set("more", [40], tokens=10)], tokenizer, window=32, num_rows=3)
    *_, (_, state) = steps = list(walk(old, old.start(), 5))
    assert state.plan.row, "the change falls into the middle of a window"
    grown = shard_set("more", [40, 20], tokens=10, shards="grown")
    new = plan_of([kept, grown, shard_set("added", [25], tokens=10)], tokenizer, window=48, num_rows=3)
    resumed = new.resume(state, accept_change=True)
    assert resumed.plan.position == state.plan.position + 32 and resumed.plan.row == 0
    before, after = (sorted(one for keys, _ in part for one in keys) for part in (steps, list(walk(new, resumed, 40))))
    assert after[0][0] == resumed.plan.position
    # What is unchanged repeats nothing of its first pass and leaves out no more than the window that was given up.
    first_pass = [index for _, name, index, epoch in (*before, *after) if name == "kept" and epoch == 0]
    given_up = resumed.plan.position - len(before)
    assert len(set(first_pass)) == len(first_pass) >= 90 - given_up
    # What changed is read once as a whole before any of it comes again.
    for name, size in (("more", 60), ("added", 25)):
        epochs = [epoch for _, which, _, epoch in after if which == name]
        first = [index for _, which, index, epoch in after if which == name and epoch == epochs[0]]
        assert sorted(first) == list(range(size)) and epochs == sorted(epochs)
    names = new.datasets
    assert (
        dict(zip(names, resumed.plan.passes, strict=True))["kept"] == dict(zip(names, resumed.plan.passes, strict=True))["added"] == Pass()
    )


@pytest.mark.parametrize("num_steps", range(1, 13))
def test_every_position_before_an_accepted_change_was_delivered_skipped_or_is_known_to_be_given_up(tokenizer, num_steps):
    old, other = (plan_of([shard_set("a", [90], shards=shards)], tokenizer, window=32, num_rows=5) for shards in ("old", "new"))
    state, accounted = old.start(), []
    for _ in range(num_steps):
        step = old.next_step(state)
        accounted += [*step.unfit, *(sample for row in step.rows for sample in row.samples)]
        state = step.state
    (change,) = other.resume(state, accept_change=True).changes
    # With the shards of then at hand, what was given up can be planned: it is the end of one window.
    by_row = plan_of([shard_set("a", [90], shards="old")], tokenizer, window=32, num_rows=1)
    place = replace(state, plan=replace(state.plan, position=change.left_position, row=change.left_row))
    while place.plan.position < change.position:
        step = by_row.next_step(place)
        accounted += step.rows[0].samples
        place = step.state
    assert sorted(sample.position for sample in accounted) == list(range(change.position))


def test_a_place_in_a_pass_is_kept_where_only_packing_changed(tokenizer):
    data = [shard_set("a", [40], tokens=10), shard_set("b", [300], tokens=10)]
    old, new = (plan_of(data, tokenizer, window=window, num_rows=5) for window in (50, 64))
    state = list(walk(old, old.start(), 1))[-1][1]
    assert state.plan.position == 50 and state.plan.row == 0, "the window is finished"
    resumed = new.resume(state, accept_change=True)
    samples = [one for keys, _ in walk(old, old.start(), 1) for one in keys] + [one for keys, _ in walk(new, resumed, 60) for one in keys]
    assert sorted(position for position, *_ in samples)[:300] == list(range(300))
    seen = [(name, index, epoch) for _, name, index, epoch in samples]
    assert len(set(seen)) == len(seen)


def test_another_seed_begins_new_passes(tokenizer):
    data = [shard_set("a", [40], tokens=10)]
    old, new = (plan_of(data, tokenizer, window=100, num_rows=10, seed=seed) for seed in (0, 1))
    state = replace(old.start(), plan=replace(old.start().plan, position=100))
    resumed = new.resume(state, accept_change=True)
    assert resumed.plan.passes == (Pass(drawn=100, epoch=3),)
    first = [(index, epoch) for keys, _ in walk(new, resumed, 1) for _, _, index, epoch in sorted(keys)]
    assert sorted(index for index, epoch in first if epoch == 3) == list(range(40))


def test_a_weight_of_zero_is_read_from_a_recipe():
    assert Dataset("x", 0.0).weight == 0.0
