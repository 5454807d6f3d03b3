"""States of runs: made by the real lock, markers and records, told apart."""

import os
import time
from dataclasses import asdict

import pytest

from megamm.checkpoint.lock import RunLock, lease_path
from megamm.core.files import write_json
from megamm.status.facts import read_facts
from megamm.status.scheduler import Job
from megamm.status.state import STATES, silent_ranks, state_of
from megamm.status.submissions import FILE, FOLDER, Submission
from megamm.telemetry.heartbeat import Beat, Heartbeats


def state(run, jobs=None) -> tuple[str, str]:
    found = state_of(read_facts(run), jobs)
    assert found[0] in STATES
    return found


def beat(start: int, rank: int = 0, **changes) -> Beat:
    facts = dict(start=start, rank=rank, host=f"node{rank}", pid=1, count=3, time=time.time(), step=7, phase="train", phase_seconds=2.0)
    return Beat(**{**facts, "doing": "", "num_collectives": 5, **changes})


def failure(run, start: int, rank: int, **changes) -> None:
    facts = dict(start=start, rank=rank, time=1e9 + rank, step=8, kind="ValueError", message="no", lost_peer=False)
    write_json(run / "errors" / f"start_{start:05d}.rank_{rank:05d}.json", {**facts, **changes})


def submission(run, job_id: str) -> None:
    one = Submission("slurm", job_id, "", "", command=[], environment={}, num_nodes=1, num_ranks=1, commit="", is_modified=False)
    write_json(run / FOLDER / "0001" / FILE, asdict(one))


def test_nobody_ever_owned_it(run):
    assert state(run)[0] == "idle"


def test_markers(run, owned):
    owned.release()
    write_json(run / "INTERRUPTED", {"step": 5, "reason": "SIGTERM", "requeue": True})
    assert state(run) == ("interrupted", "after step 5: SIGTERM")
    # Half written, or of somebody's own making: it is still there.
    (run / "INTERRUPTED").write_text('{"step": 5')
    assert state(run)[0] == "interrupted"
    (run / "DONE").write_text("")
    assert state(run)[0] == "done"


def test_an_owner_that_lives(run):
    lock = RunLock.acquire(run, lease_seconds=60.0)
    try:
        assert state(run)[0] == "starting"
        lock.started_at(0)
        Heartbeats(run).write(beat(1))
        assert state(run) == ("running", "")
        Heartbeats(run).write(beat(1, phase="evaluate", phase_seconds=90.0))
        found, why = state(run)
        assert found == "running" and why.startswith("step 7, evaluate for 1 min 30 s")
        # What an earlier start left behind tells nothing of this one.
        Heartbeats(run).write(beat(0, rank=1, is_stalled=True))
        assert state(run)[0] == "running"
        Heartbeats(run).write(beat(1, rank=1, is_stalled=True))
        assert state(run)[0] == "stalled"
    finally:
        lock.release()


def test_silent_ranks_are_named(run, owned):
    Heartbeats(run).write(beat(1))
    Heartbeats(run).write(beat(1, rank=1, time=time.time() - 90))
    (told,) = silent_ranks(read_facts(run))
    assert told.startswith("rank 1 on node1 is silent for 1 min 30 s")


def test_an_owner_that_left_without_a_word(run, owned):
    owned.release()
    assert state(run)[0] == "failed"


def test_an_error_tells_before_the_lease_runs_out(run, owned):
    failure(run, owned.number, 1)
    assert state(run) == ("failed", "at step 8")
    failure(run, owned.number, 0, kind="Stall", message="nothing moved", time=1.0)
    assert state(run) == ("stalled", "nothing moved")


def test_an_error_of_the_last_start_and_one_of_an_earlier_one(run):
    first = RunLock.acquire(run, lease_seconds=60.0)
    first.started_at(0)
    first.release()
    failure(run, 1, 0)
    assert state(run) == ("failed", "at step 8")
    second = RunLock.acquire(run, lease_seconds=60.0)
    second.started_at(5)
    assert state(run)[0] == "running"
    second.release()
    write_json(run / "INTERRUPTED", {"step": 9, "reason": "SIGUSR1"})
    assert state(run)[0] == "interrupted"
    # The next one found its data gone before it took the marker away.
    third = RunLock.acquire(run, lease_seconds=60.0)
    failure(run, 3, 0, step=9)
    third.release()
    assert state(run) == ("failed", "at step 9")


def test_an_owner_that_was_killed_is_dead_at_once_where_it_ran_here(run, die):
    die(run, 0)
    found, why = state(run)
    assert found == "dead" and "its process is gone" in why


def test_an_owner_elsewhere_is_dead_when_its_lease_stands_still(run, owned):
    lease = lease_path(run, owned.number)
    assert state(run)[0] == "running"
    owned._ended.set()
    owned._thread.join()
    os.utime(lease, (time.time() - 500, time.time() - 500))
    found, why = state(run)
    assert found == "dead" and "silent for 8 min" in why


def test_the_scheduler_knows_better_than_a_lease(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    lock = RunLock.acquire(run, lease_seconds=60.0)
    lock.started_at(0)
    try:
        assert state(run, {"12": Job("12", "RUNNING")})[0] == "running"
        assert state(run, {})[0] == state(run, None)[0] == "running"
        found, why = state(run, {"12": Job("12", "NODE_FAIL")})
        assert found == "dead" and "job 12 is NODE_FAIL" in why
        # Requeued: the old owner is history, the job waits.
        assert state(run, {"12": Job("12", "PENDING", "BeginTime")}) == ("queued", "job 12 PENDING, BeginTime")
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ({"7": Job("7", "PENDING", "Priority", starts_at="2026-01-01T00:00:00")}, "queued"),
        ({"7": Job("7", "RUNNING")}, "starting"),
        ({"7": Job("7", "FAILED")}, "failed"),
        ({}, "failed"),
        (None, "queued"),
    ],
)
def test_a_submission_before_the_run_begins(tmp_path, jobs, expected):
    submission(tmp_path, "7")
    found, why = state(tmp_path, jobs)
    assert found == expected and "job 7" in why
