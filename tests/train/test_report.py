"""What the log says of waiting for data, and that it says it of the slowest rank."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from megamm.engine.distributed import World
from megamm.train.report import StepReport
from megamm.train.step import GlobalCounts
from tests.support import tiny_run

WORLD = World(rank=0, local_rank=0, size=3, device=torch.device("cpu"), backend="gloo")


def counts(waits_seconds: list[float]) -> GlobalCounts:
    return GlobalCounts(
        weight_sum=1.0,
        task_weight_sums=[1.0],
        num_tokens=10,
        num_supervised=5,
        num_slots=20,
        num_skipped={},
        waits_seconds=waits_seconds,
        num_failed=0,
        stop_requested=False,
        flops=0.0,
    )


@pytest.mark.parametrize(("wait", "is_told"), [(0.02, True), (0.005, False)])
def test_long_waits_are_told_once_in_fifty_steps_with_the_slowest_rank(monkeypatch, caplog, wait, is_told):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("megamm.train.report.time.monotonic", lambda: clock.now)
    monkeypatch.setattr(logging.getLogger("megamm"), "propagate", True)
    report = StepReport(tiny_run.recipe(), SimpleNamespace(config=None, ranks=None), WORLD)
    for _ in range(100):
        report.begin()
        clock.now += wait / 2
        report.data_arrived()
        assert report.waited_seconds == pytest.approx(wait / 2)
        clock.now += 0.1 - wait / 2
        report.end(counts([wait / 2, 0.0, wait]))
    told = [record.getMessage() for record in caplog.records if "waiting for data" in record.getMessage()]
    assert len(told) == (2 if is_told else 0)
    assert all("the last 50 steps spent 20 % of their time waiting for data, most on rank 2" in message for message in told)
