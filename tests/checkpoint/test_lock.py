"""Who owns a run: one at a time, taken over only from the gone."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.checkpoint.fence import Fence, check_fence, newest_owner, starts
from megamm.checkpoint.hold import hold_run
from megamm.checkpoint.lock import LostRun, Owner, RunLock, _move_lease, lease_path, read_owner
from megamm.checkpoint.seal import opened, sealed
from megamm.core.errors import CheckpointError

SHORT = 0.6
HOLDER = """
import sys, time
from pathlib import Path
from megamm.checkpoint.lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]), lease_seconds=0.6)
print(lock.number, flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def hold_elsewhere(run):
    """Start another process that owns the run; ended at the end."""
    children = []

    def hold(**variables):
        arguments = [sys.executable, "-c", HOLDER, str(run)]
        child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | variables, text=True)
        children.append(child)
        assert child.stdout.readline().strip().isdigit()
        return child

    yield hold
    for child in children:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def acquire(run, lease_seconds=SHORT):
    return RunLock.acquire(run, lease_seconds=lease_seconds)


def begin(run):
    """An owner that went on from step 0 and left."""
    lock = acquire(run)
    lock.started_at(0)
    lock.release()


def change_owner(run, **facts):
    """As if another machine had written it."""
    path = run / ".lock" / f"{newest_owner(run):08d}.owner"
    path.write_text(sealed(opened(path.read_bytes()) | facts))


def test_owners_follow_each_other_and_leave_little_behind(run):
    for number in range(1, 5):
        lock = acquire(run)
        assert lock.number == newest_owner(run) == number
        lock.started_at(0)
        lock.check()
        lock.release()
    names = sorted(path.name for path in (run / ".lock").iterdir())
    assert names == ["00000003.lease", "00000003.owner", "00000004.lease", "00000004.owner"]


def test_a_new_folder_in_which_nothing_began_is_as_it_was(run):
    acquire(run).release()
    assert not run.exists()
    (run / "logs").mkdir(parents=True)
    acquire(run).release()
    assert [path.name for path in run.iterdir()] == ["logs"]


def test_a_second_job_is_refused_with_the_firsts_id(run, hold_elsewhere):
    child = hold_elsewhere(SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="2")
    with pytest.raises(CheckpointError, match=rf"in use by job 4711 \(restart 2\) on .*, pid {child.pid}"):
        acquire(run)
    assert newest_owner(run) == 1


def test_a_process_that_is_gone_from_this_machine_is_followed_at_once(run, hold_elsewhere):
    child = hold_elsewhere()
    child.send_signal(signal.SIGKILL)
    child.wait()
    started = time.monotonic()
    lock = acquire(run, lease_seconds=60.0)
    assert lock.number == 2
    assert time.monotonic() - started < 5.0
    lock.release()


def test_a_process_that_hangs_loses_the_run_with_its_lease(run, hold_elsewhere):
    child = hold_elsewhere()
    child.send_signal(signal.SIGSTOP)
    lock = acquire(run)
    assert lock.number == 2
    child.send_signal(signal.SIGCONT)
    child.stdin.close()
    assert child.wait(timeout=20) == 0
    lock.check()
    lock.release()


def test_another_machines_silence_must_last_a_lease(run):
    first = acquire(run)
    first._ended.set()
    change_owner(run, host="node9")
    started = time.monotonic()
    second = acquire(run)
    assert time.monotonic() - started >= SHORT
    with pytest.raises(LostRun, match="was taken over by"):
        first.check()
    with pytest.raises(LostRun):
        first.check()
    first.release()
    second.check()
    assert newest_owner(run) == 2
    second.release()


def test_another_machines_sign_of_life_refuses(run):
    first = acquire(run)
    change_owner(run, host="node9", pid_started=1.0)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="on node9"):
        acquire(run, lease_seconds=100.0)
    assert time.monotonic() - started < 100.0
    first.release()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_when_a_process_began_does_not_move_with_the_clock(run, hold_elsewhere):
    """Counted from the boot: a time of day would differ once the clock was set, and a live owner look like another process."""
    hold_elsewhere()
    began = read_owner(run, 1).pid_started
    assert 0 < began <= time.clock_gettime(time.CLOCK_BOOTTIME)
    with pytest.raises(CheckpointError, match="in use by"):
        acquire(run)


def test_a_process_number_that_is_used_again_is_no_sign_of_life(run):
    first = acquire(run)
    change_owner(run, pid_started=1.0)
    second = acquire(run, lease_seconds=60.0)
    assert second.number == 2
    for lock in (first, second):
        lock.release()


SQUEUE = """#!/bin/sh
case "$*" in
    *--jobs=1*) echo RUNNING ;;
    *--jobs=2*) echo FAILED ;;
    *--jobs=3*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
    *--jobs=4*) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;;
    *--jobs=5*) echo PENDING ;;
    *--jobs=7*) printf 'RUNNING\nCOMPLETED\nRUNNING\n' ;;
    *--jobs=8*) printf 'FAILED\nCOMPLETED\n' ;;
esac
"""


@pytest.mark.parametrize(
    ("job_id", "is_gone"),
    [("1", False), ("2", True), ("3", True), ("4", False), ("5", True), ("6", True), ("7", False), ("8", True)],
    ids=lambda value: str(value),
)
def test_the_scheduler_is_asked_about_other_jobs(run, tmp_path, monkeypatch, job_id, is_gone):
    """Gone: ended, forgotten, waiting to be started again. Not gone: running, one of an array's tasks running, or nobody answers."""
    program = tmp_path / "programs" / "squeue"
    program.parent.mkdir()
    program.write_text(SQUEUE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    first = acquire(run)
    change_owner(run, host="node9")
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    if is_gone:
        second = acquire(run, lease_seconds=60.0)
        assert second.number == 2
        second.release()
    else:
        with pytest.raises(CheckpointError, match=f"in use by job {job_id}"):
            acquire(run)
    first.release()


def test_another_clusters_jobs_are_not_asked_for(run, tmp_path, monkeypatch):
    program = tmp_path / "squeue"
    program.write_text(SQUEUE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    first = acquire(run)
    change_owner(run, host="node9", cluster="far")
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    with pytest.raises(CheckpointError, match="in use by job 2"):
        acquire(run)
    first.release()


def test_a_restarted_job_follows_itself(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    first = acquire(run)
    change_owner(run, host="node9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = acquire(run)
    assert second.number == 2
    with pytest.raises(LostRun, match=r"taken over by job 7 \(restart 1\)"):
        first.check()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(CheckpointError, match=r"in use by job 7 \(restart 1\)"):
        acquire(run)
    for lock in (first, second):
        lock.release()


def test_a_full_disk_takes_no_lease_away(run, monkeypatch):
    lock = acquire(run, lease_seconds=100.0)
    write_text = Path.write_text

    def refused(self, text, **options):
        if self.suffix == ".tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", refused)
    before = lease_path(run, lock.number).read_text()
    lock.check()
    assert lease_path(run, lock.number).read_text() != before
    assert not list(run.glob(".lock/.*.lease*"))
    monkeypatch.undo()
    lock.release()


def race(run, barrier, results):
    barrier.wait()
    try:
        lock = RunLock.acquire(run, lease_seconds=5.0)
        results.put(lock.number)
        # It holds the run until all others have been told so.
        barrier.wait()
        lock.release()
    except CheckpointError:
        results.put(0)
        barrier.wait()


def test_of_many_at_once_one_wins(run):
    begin(run)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    children = [context.Process(target=race, args=(run, barrier, results)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sorted(results.get() for _ in children) == [0, 0, 0, 0, 0, 2]


def come_and_go(run, results):
    """Own a new run and begin nothing, again and again."""
    found = set()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        try:
            lock = acquire(run)
        except CheckpointError as error:
            found.add("refused" if "in use by" in str(error) else str(error))
        except OSError as error:
            found.add(repr(error))
        else:
            found.add("owned")
            lock.release()
    results.put(found)


def test_owners_that_leave_no_trace_are_in_nobodys_way(run):
    """They take the folder away that others are about to enter."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=come_and_go, args=(run, results)) for _ in range(4)]
    for child in children:
        child.start()
    found = set().union(*(results.get() for _ in children))
    for child in children:
        child.join()
    assert "owned" in found and found <= {"owned", "refused"}


def test_a_folder_that_vanishes_while_it_is_made_is_made_anew(run, monkeypatch):
    """`mkdir` finds it there, and it is no folder any more when it asks what it found."""
    (run / ".lock").mkdir(parents=True)
    is_dir, vanished = Path.is_dir, []

    def vanish(path, *args, **kwargs):
        if path == run / ".lock" and not vanished:
            vanished.append(path)
            path.rmdir()
        return is_dir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "is_dir", vanish)
    lock = acquire(run)
    assert vanished
    assert lock.number == 1
    lock.release()


def test_a_file_where_the_folder_belongs_is_an_error(run):
    run.mkdir()
    (run / ".lock").write_text("")
    with pytest.raises(OSError, match=r"\.lock"):
        acquire(run)


def test_processes_of_equal_numbers_keep_their_drafts_apart(run):
    """As those of two containers; here threads, which have one number too."""
    (run / ".lock").mkdir(parents=True)
    path = lease_path(run, 1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda count: _move_lease(path, count), range(400)))
    assert path.read_text().strip().isdigit()
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_record_that_cannot_be_read_is_named(run):
    begin(run)
    path = run / ".lock" / "00000001.owner"
    whole = path.read_bytes()
    for at in range(0, len(whole), 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"00000001\.owner cannot be read"):
            acquire(run)
        with pytest.raises(CheckpointError, match=r"\.lock cannot be read"):
            check_fence(run / "checkpoints" / "step_00000001", Fence(1), 1)
    path.write_bytes(whole)
    acquire(run).release()


def test_a_damaged_lease_costs_its_owner_nothing(run, hold_elsewhere):
    hold_elsewhere()
    (run / ".lock" / "00000001.lease").write_bytes(b"\xb7")
    with pytest.raises(CheckpointError, match="in use by"):
        acquire(run)


def test_what_an_owner_was_writing_when_it_died_goes_with_it(run):
    begin(run)
    draft = run / ".lock" / ".00000001.lease.4711.tmp"
    draft.write_text("7")
    begin(run)
    assert draft.exists(), "the last owner's files stay"
    begin(run)
    assert not draft.exists()


def test_ranks_hold_a_run_together(run, world):
    with hold_run(run, world, lease_seconds=SHORT) as hold:
        assert hold.fence.number == 1
        hold.started_at(0)
        hold.check()
        with pytest.raises(CheckpointError, match="in use by") as raised, hold_run(run, world, lease_seconds=SHORT):
            pass
        assert raised.value.on_all_ranks
    with hold_run(run, world, lease_seconds=60.0) as hold:
        assert hold.fence.number == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path, world):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be locked"), hold_run(tmp_path / "file", world, lease_seconds=SHORT):
        pass


def test_every_start_is_remembered_by_the_newest_owner(run):
    for step in (0, 10, 5):
        lock = acquire(run)
        lock.started_at(step)
        lock.release()
    acquire(run).release()
    assert starts(run) == [(1, 0), (2, 10), (3, 5)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.data())
def test_a_checkpoint_counts_unless_a_later_owner_went_on_from_before_it(tmp_path_factory, begins, data):
    run = tmp_path_factory.mktemp("run")
    (run / ".lock").mkdir()
    table = [[number, step] for number, step in enumerate(begins, start=1)]
    number, step = data.draw(st.integers(0, len(begins))), data.draw(st.integers(0, 40))
    (run / ".lock" / f"{len(begins):08d}.owner").write_text(sealed({"starts": table}))
    abandoned = any(begin < step for begin in begins[number:])
    try:
        check_fence(run / "checkpoints" / f"step_{step:08d}", Fence(number), step)
    except CheckpointError as error:
        assert abandoned and f"written by owner {number}" in str(error)
    else:
        assert not abandoned


def test_this_process_is_described_as_it_is():
    owner = Owner.this_process(5.0)
    assert (owner.pid, owner.is_released) == (os.getpid(), False)
    assert Owner(**json.loads(json.dumps({name: getattr(owner, name) for name in owner.__slots__}))) == owner
