"""What a cluster does to a job, in short: the events that each take another way through Slurm, one rank a node.

`python -m benchmarks.slurm_events` has all of them, with two ranks a node.
"""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.slurm_events import EVENTS, LOSS_TOLERANCE, Event
from benchmarks.slurm_strikes import Yard
from tests.support.slurm.cluster import Cluster
from tests.support.slurm.training import CHECKOUT, wait_until
from tests.support.slurm.unbroken import compare

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


@pytest.mark.parametrize("damage", ["lost", "repeated", "exchanged"])
def test_a_step_of_other_samples_is_seen(yard: Yard, tmp_path: Path, damage: str):
    unbroken = yard.unbroken(2)
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    third = next(number for number, line in enumerate(lines) if line["step"] == 3 and "loss" in line)
    replacement = {"lost": [], "repeated": [lines[third]] * 2, "exchanged": [{**lines[third], "sample_keys": "0" * 32}]}
    lines[third : third + 1] = replacement[damage]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare(unbroken, unbroken).num_samples == 0
    difference = compare(run, unbroken)
    assert difference.num_samples > 0 and difference.num_tensors == 0


def test_what_is_left_of_a_start_does_not_requeue_the_next(can_run_slurm: None, tmp_path: Path):
    ask, told = tmp_path / "ask", tmp_path / "told"
    # The first start asks for a requeue when it is told to, behind a cut cable; the second one only runs.
    script = f"""source {CHECKOUT}/slurm/common.sh; export MEGAMM_HOME={CHECKOUT} MEGAMM_SITE= MEGAMM_REQUEUE_WAIT_S=1; begin_job
        [ "$restart" = 0 ] || {{ touch {tmp_path}/next-$restart; exec sleep 600; }}
        touch {tmp_path}/first; until [ -e {ask} ]; do sleep 0.1; done; touch {told}; while true; do requeue; sleep 0.1; done"""
    wrapper = tmp_path / "job.sh"
    wrapper.write_text(f"#!/usr/bin/env bash\n{script}\n")
    with Cluster(2) as cluster:
        job = cluster.submit("--nodes=1", "--output=/dev/null", str(wrapper))
        wait_until((tmp_path / "first").exists, "the first start")
        lost = cluster.job(job)["BatchHost"]
        cluster.unplug(lost)
        wait_until((tmp_path / "next-1").exists, "the next start")
        ask.touch()
        wait_until(told.exists, "the question")
        cluster.plug_in(lost)
        wait_until(lambda: _is_idle(cluster, lost), "the end of what was left behind")
        assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("RUNNING", "1")


def _is_idle(cluster: Cluster, node: str) -> bool:
    state = cluster.run("sinfo", "--noheader", f"--nodes={node}", "--partition=main", "--format=%T").stdout.strip()
    return state == "idle" and "slurm_script" not in cluster.run("ps", "-eo", "args", node=node).stdout
