"""What a run decided to leave out, on the disk: what it adds to a checkpoint's state, and which checkpoints it takes away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamm.checkpoint.hold import Hold
from megamm.checkpoint.manifest import DATA_STATE, step_folder
from megamm.core.errors import CheckpointError
from megamm.core.files import write_json
from megamm.data.planning.mixture import Segment
from megamm.data.planning.state import LoaderState, Pass, PlanState
from megamm.data.planning.stretch import Stretch
from megamm.train.rewinds import FILE, decide, decisions, set_aside_abandoned, with_decisions

IDENTITY = {"seed": "1"}


def state_after(num_steps: int, *stretches: Stretch, step: int = 0, **identity: str) -> LoaderState:
    plan = PlanState(32 * num_steps, 0, num_steps, ("a",), (Segment(0, (1,), (0,)),), (), (Pass(),))
    return LoaderState(step or num_steps, plan, IDENTITY | identity, stretches=stretches)


def stretch(first: int, last: int) -> Stretch:
    plan = state_after(0).fingerprint
    return Stretch(first, last, (32 * first - 32, 0), (32 * last, 0), plan=plan, reason="loss 9.5", from_step=last, to_step=first - 1)


def checkpoint(run: Path, state: LoaderState) -> Path:
    folder = run / "checkpoints" / step_folder(state.step)
    write_json(folder / DATA_STATE, {**state.to_json(), "watch": {}})
    return folder


def test_decisions_come_back_in_order(tmp_path):
    assert decisions(tmp_path) == ()
    for one in (stretch(13, 15), stretch(17, 18)):
        decide(tmp_path, one)
    assert decisions(tmp_path) == (stretch(13, 15), stretch(17, 18))


def test_a_state_learns_what_was_decided_after_it_and_nothing_twice(tmp_path):
    first, second = stretch(13, 15), stretch(17, 18)
    decide(tmp_path, first)
    decide(tmp_path, second)
    assert with_decisions(state_after(8), tmp_path).stretches == (first, second)
    assert with_decisions(state_after(12, first), tmp_path).stretches == (first, second)
    assert with_decisions(state_after(16, first), tmp_path).stretches == (first, second)
    knows = state_after(20, first, second, step=15)
    assert with_decisions(knows, tmp_path) == knows
    # Under other data the steps are other data.
    assert with_decisions(state_after(8, seed="2"), tmp_path).stretches == ()


def test_only_checkpoints_that_were_trained_on_the_stretch_are_set_aside(tmp_path):
    first = stretch(13, 15)
    before, within, after = checkpoint(tmp_path, state_after(12)), state_after(14), state_after(17, first, step=16)
    abandoned, later = checkpoint(tmp_path, within), checkpoint(tmp_path, after)
    other = checkpoint(tmp_path, replace(state_after(20, seed="2"), step=20))
    torn = checkpoint(tmp_path, replace(state_after(14), step=15))
    (torn / DATA_STATE).write_text('{"version": ')
    set_aside_abandoned(tmp_path, Hold())
    assert abandoned.is_dir(), "nothing was decided yet"
    decide(tmp_path, first)
    set_aside_abandoned(tmp_path, Hold())
    assert not abandoned.exists() and abandoned.with_name("step_00000014.abandoned-1").is_dir()
    assert all(folder.is_dir() for folder in (before, later, other, torn))


def test_decisions_that_cannot_be_read_are_named(tmp_path):
    for content in ([{"first": 1}], {"first": 1}, [None]):
        write_json(tmp_path / FILE, content)
        with pytest.raises(CheckpointError, match=r"rewinds\.json cannot be read .*; restore it, or remove it to decide anew"):
            decisions(tmp_path)
