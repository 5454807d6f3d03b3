"""What a cluster does to a job, in short: the events that each take another way through Slurm, one rank a node.

`python -m benchmarks.slurm_events` has all of them, with two ranks a node.
"""

from pathlib import Path

import pytest

from benchmarks.slurm_events import EVENTS, LOSS_TOLERANCE, Event
from benchmarks.slurm_strikes import Yard
from tests.support.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

SHORT = ("preemption with grace", "power-off, none spare", "network partition of a whole job")


@pytest.fixture(scope="module")
def yard(can_run_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Yard:
    return Yard(tmp_path_factory.mktemp("events"), num_tasks=1)


@pytest.mark.parametrize("event", [event for event in EVENTS if event.name in SHORT], ids=lambda event: event.name)
def test_a_run_outlives(event: Event, yard: Yard, tmp_path: Path):
    with Cluster(event.num_nodes) as cluster:
        seen = event.strike(cluster, yard, tmp_path / "run")
    assert seen.outcome == event.expected
    assert seen.num_wrong_samples == 0
    assert seen.num_unequal_tensors in (0, None), "another number of ranks cannot be bit-equal, the same must be"
    assert seen.loss_difference is not None and seen.loss_difference <= LOSS_TOLERANCE
    assert seen.resume_seconds is not None
