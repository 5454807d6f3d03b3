"""What is no state is refused in one line: a checkpoint or a run's table may hold anything."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megamm.core.errors import DataError
from megamm.data.planning.state import DataChange, LoaderState
from megamm.data.planning.stretch import Stretch
from tests.support.plans import plan_of, shard_set


@pytest.fixture(scope="module")
def state(tokenizer):
    sets = [shard_set(name, [40], tokens=10) for name in ("a", "b")]
    start = plan_of(sets, tokenizer, window=32, num_rows=2).start().excluding(["a/x", "b/y"])
    stretch = Stretch(4, 6, (32, 1), (64, 0), plan="new", reason="loss 9.5", from_step=6, to_step=3)
    return replace(start, changes=(DataChange(3, 64, 32, 1, "old", "new", ("seed",)),), stretches=(stretch,))


PLACES = {
    "position": [-1, 1.5, "3", None, True, []],
    "row": [-1, 0.0, "0", None],
    "num_steps": [-1, 0.5, "0", None],
    "stretches": [None, [None], [{}], {"first": 1}],
    "step": [-1, 2.5, "1", None],
    "datasets": [None, "ab", [], ["a"], ["b", "a"], ["a", "a"], [1, 2], {"a": 1, "b": 2}],
    "weights": [
        None,
        [],
        [[]],
        {},
        [{"start": 0, "weights": [0, 0], "drawn": [0, 0]}],
        [{"start": 0, "weights": [1, -1], "drawn": [0, 0]}],
        [{"start": 0, "weights": [1, 0.5], "drawn": [0, 0]}],
        [{"start": 0, "weights": "11", "drawn": [0, 0]}],
        [{"start": 0, "weights": [1, 1], "drawn": [0, -1]}],
        [{"start": 0, "weights": [1, 1], "drawn": [0]}],
        [{"start": -1, "weights": [1, 1], "drawn": [0, 0]}],
        [{"start": 1, "weights": [1, 1], "drawn": [0, 0]}],
        [{"start": 0, "weights": [1, 1], "drawn": [0, 0]}, {"start": 0, "weights": [1, 2], "drawn": [0, 0]}],
    ],
    "schedule": [None, [{}], [{"step": 5, "weights": [0, 0]}], [{"step": -5, "weights": [1, 0]}], [{"step": 5, "weights": [1]}]],
    "passes": [None, [[0, 0]], [[0, 0], [0]], [[0, 0], [0, -1]], [[0, 0], [0, 0, 0]], ["00", "00"]],
}
STATES = {
    **PLACES,
    "exclusions": [
        None,
        [None],
        [{"after_step": 0, "keys": "abc"}],
        [{"after_step": 0, "keys": None}],
        [{"after_step": 0, "keys": [1]}],
        [{"after_step": -1, "keys": ["a/x"]}],
    ],
    "changes": [None, [None], [{}], {"old": 1}],
    "identity": [None, [], "abc", {"seed": 1}],
}
CHANGES = {
    "after_step": [-1, "1"],
    "position": [None, -1],
    "left_row": [0.5],
    "old": [None, 3],
    "changed": [None, "seed", [1]],
    "more": [1],
}
STRETCHES = {
    "first": [-1, "4"],
    "start": [None, [32], [32, -1], "ab"],
    "end": [[64, 0, 0]],
    "plan": [None, 3],
    "reason": [["x"]],
    "to_step": [0.5],
    "more": [1],
}
NO_OBJECTS = [None, [], [1], "version", 3, True]


def cases(parts: dict) -> list[tuple]:
    return [pytest.param(name, value, id=f"{name}={json.dumps(value)}") for name, values in parts.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(STATES))
def test_a_state_of_other_values_is_refused(state, name, value):
    good = state.to_json()
    assert LoaderState.from_json(json.loads(json.dumps(good))) == state
    with pytest.raises(DataError, match=r"data state cannot be read .*; resume from another checkpoint"):
        LoaderState.from_json({**good, name: value})


@pytest.mark.parametrize(("name", "value"), cases(CHANGES))
def test_a_change_of_other_values_is_refused(state, name, value):
    good = state.to_json()
    with pytest.raises(DataError, match="data state cannot be read"):
        LoaderState.from_json({**good, "changes": [{**good["changes"][0], name: value}]})


@pytest.mark.parametrize(("name", "value"), cases(STRETCHES))
def test_a_stretch_of_other_values_is_refused(state, name, value):
    good = state.to_json()
    with pytest.raises(DataError, match="data state cannot be read"):
        LoaderState.from_json({**good, "stretches": [{**good["stretches"][0], name: value}]})


@pytest.mark.parametrize(("name", "value"), cases({**PLACES, "plan": [None, 1, ["a"]]}))
def test_a_place_of_other_values_is_refused(state, name, value):
    good = state.position_json()
    assert LoaderState.from_position_json(json.loads(json.dumps(good)), state.identity) == replace(state, exclusions=(), changes=())
    with pytest.raises(DataError, match=r"a place in the data cannot be read .*; take that of another step"):
        LoaderState.from_position_json({**good, name: value}, state.identity)


@pytest.mark.parametrize("value", NO_OBJECTS)
def test_what_is_no_object_is_no_state(state, value):
    with pytest.raises(DataError, match="data state cannot be read"):
        LoaderState.from_json(value)
    with pytest.raises(DataError, match="a place in the data cannot be read"):
        LoaderState.from_position_json(value, state.identity)
