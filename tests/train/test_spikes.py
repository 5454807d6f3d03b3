"""The watch over losses and updates: what it calls a spike, and that it goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megamm.config import Spike
from megamm.core.errors import CheckpointError
from megamm.train.spikes import SpikeWatch
from megamm.train.step import why_not_applied

SPIKE = Spike(window=16, factor=6.0, patience=3)


def watch_of(num_steps: int = 16, **changes) -> SpikeWatch:
    """A watch that has seen ordinary steps: a loss that falls and trembles."""
    watch = SpikeWatch(SPIKE, max_unapplied=changes.get("max_unapplied", 2))
    for step in range(1, num_steps + 1):
        assert see(watch, step) is None
    return watch


def see(watch: SpikeWatch, step: int, loss: float | None = None, grad_norm: float = 1.0, not_applied: str = ""):
    usual = 3.0 - 0.001 * step + 0.02 * math.sin(step)
    return watch.see(step, loss=usual if loss is None else loss, grad_norm=grad_norm, not_applied=not_applied)


def test_a_spike_is_told_after_so_many_steps_in_a_row():
    watch = watch_of()
    assert see(watch, 17, 4.0) is None and see(watch, 18, 5.0) is None
    trouble = see(watch, 19, 9.5)
    assert trouble is not None and trouble.is_spike and trouble.first_step == 17
    assert trouble.reason.startswith("steps 17 to 19: loss 9.5 is above 3.") and "usual is 2.99" in trouble.reason
    # What is usual must be learnt anew: the watch is silent for a whole window.
    assert all(see(watch, step, 9.5) is None for step in range(20, 50))


def test_a_step_that_jumps_alone_is_no_spike_and_leaves_no_trace():
    watch, calm = watch_of(), watch_of()
    for step in range(17, 40):
        jumps = step % 3
        assert see(watch, step, 9.0 if jumps else None) is None
        if not jumps:
            see(calm, step)
    assert watch.to_json() == calm.to_json() | {key: watch.to_json()[key] for key in ("first_step", "num_spiking")}


def test_the_norm_of_the_gradient_counts_too():
    watch = watch_of()
    for step in (17, 18):
        assert see(watch, step, grad_norm=50.0) is None
    assert "gradient norm 50 is above 1.062 (usual is 1)" in see(watch, 19, grad_norm=50.0).reason


def test_nothing_is_judged_before_the_window_is_full():
    watch = watch_of(10)
    assert all(see(watch, step, 9.0) is None for step in range(11, 17))


def test_a_falling_loss_and_noise_are_no_spikes():
    """Normal noise of one standard deviation: three steps in a row beyond six of them do not happen."""
    watch = SpikeWatch(SPIKE, max_unapplied=0)
    random = np.random.default_rng(0)
    losses = 8 * np.exp(-np.arange(5000) / 800) + 2 + random.normal(0, 0.1, 5000)
    norms = np.exp(random.normal(0, 0.5, 5000))
    for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), start=1):
        assert watch.see(step, loss=loss, grad_norm=norm, not_applied="") is None


def test_updates_that_are_not_applied_end_the_patience_of_their_own_bound():
    watch = watch_of()
    assert see(watch, 17, math.nan, math.inf, "loss") is None
    assert see(watch, 18, not_applied="gradient", grad_norm=math.inf) is None
    trouble = see(watch, 19, math.nan, math.inf, "loss")
    assert trouble is not None and not trouble.is_spike and trouble.first_step == 17
    assert trouble.reason == "steps 17 to 19: 3 updates in a row were not applied, because the loss is not finite"
    assert watch.totals() == {"unapplied_updates": 3, "overflows": 0}


def test_an_applied_update_ends_the_row_but_not_the_spike():
    watch = watch_of()
    assert see(watch, 17, 9.0) is None
    assert see(watch, 18, math.nan, math.inf, "loss") is None and see(watch, 19, math.nan, math.inf, "loss") is None
    assert see(watch, 20, 9.0) is None and see(watch, 21, math.nan, math.inf, "gradient") is None
    trouble = see(watch, 22, 9.0)
    assert trouble is not None and trouble.is_spike and trouble.first_step == 17


def test_overflows_of_fp16_are_counted_apart_and_nothing_else():
    watch, calm = watch_of(), watch_of()
    for step in range(17, 60):
        assert see(watch, step, grad_norm=math.inf, not_applied="overflow") is None
    assert watch.totals() == {"unapplied_updates": 0, "overflows": 43}
    assert watch.to_json() == calm.to_json() | {"num_overflows": 43}


def test_a_step_without_supervision_says_nothing():
    watch, calm = watch_of(), watch_of()
    assert see(watch, 17, 0.0, 0.0) is None and watch.to_json() == calm.to_json()


@pytest.mark.parametrize("done", range(1, 24))
def test_a_resumed_watch_judges_as_one_that_was_never_interrupted(done):
    steps = (
        [(None, 1.0, "")] * 17
        + [(9.0, 1.0, ""), (math.nan, math.inf, "loss"), (9.0, 1.0, ""), (None, 1.0, ""), (9.0, 1.0, "")]
        + [(math.nan, math.inf, "loss")] * 3
    )

    def judge(watch, steps, first):
        return [see(watch, step, *facts) for step, facts in enumerate(steps, start=first)]

    whole = judge(SpikeWatch(SPIKE, max_unapplied=2), steps, 1)
    before = SpikeWatch(SPIKE, max_unapplied=2)
    judge(before, steps[:done], 1)
    after = SpikeWatch(SPIKE, max_unapplied=2)
    after.restore(json.loads(json.dumps(before.to_json())))
    assert judge(after, steps[done:], done + 1) == whole[done:] and whole[-1] is not None


@pytest.mark.parametrize("change", [{"losses": None}, {"losses": ["x"]}, {"norms": [math.nan]}, {"first_step": None}])
def test_a_record_of_something_else_is_refused(change):
    with pytest.raises(CheckpointError, match="the record of past losses cannot be read"):
        watch_of().restore({**watch_of().to_json(), **change})


def test_why_an_update_was_not_applied():
    """An overflow needs a finite loss and a loss scale that could still fall: fp16's alone."""
    assert why_not_applied(2.5, may_overflow=True) == "overflow"
    assert why_not_applied(2.5, may_overflow=False) == "gradient"
    for loss in (math.nan, math.inf):
        assert why_not_applied(loss, may_overflow=True) == why_not_applied(loss, may_overflow=False) == "loss"
