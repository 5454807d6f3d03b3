"""Saving behind training, with the real engine: nothing mixes two steps, and no failure ends or stalls what it need not."""

import errno
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.commit import Attempt, Progress, write_files
from megamm.checkpoint.fence import Fence, starts
from megamm.checkpoint.hold import Hold, hold_run
from megamm.checkpoint.io import LOCAL, Io
from megamm.checkpoint.lock import LostRun, RunLock, read_owner
from megamm.checkpoint.manifest import committed, read_data_state, read_ledger, read_manifest, verify
from megamm.checkpoint.saver import Committed, Failed, Saver
from megamm.checkpoint.seal import opened, sealed
from megamm.config.schema import Checkpointing
from megamm.core.errors import CheckpointError
from megamm.engine import distributed, partitions
from tests.support.faults import Broken, slow
from tests.support.models import build_engine, train
from tests.support.ranks import run_ranks

KEEP_ALL = {"keep_last": 100}


@pytest.fixture(scope="module")
def engine(world):
    engine = build_engine(1)
    train(engine, 0, 1, 0, 1)
    yield engine
    engine.close()


@pytest.fixture
def make_saver(engine, world, tmp_path):
    """A saver into `tmp_path`/run/checkpoints; closed at the end."""
    savers = []

    def make(io=None, hold=None, **settings):
        arguments = {"hold": hold} | ({"io": io} if io else {})
        savers.append(Saver(tmp_path / "run" / "checkpoints", engine, world, Checkpointing(**(KEEP_ALL | settings)), **arguments))
        return savers[-1]

    yield make
    for saver in savers:
        saver.__exit__(None, None, None)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def poll_to_the_end(saver):
    outcomes = []
    while saver.is_pending:
        outcomes += saver.poll()
        time.sleep(0.001)
    return outcomes + saver.poll()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "latest")


def test_training_goes_on_while_a_save_is_written(make_saver, folder):
    saver = make_saver(slow(0.1))
    saver.save(Progress(1))
    assert saver.poll() == []
    assert saver.is_pending
    assert committed(folder) == []
    (outcome,) = poll_to_the_end(saver)
    assert isinstance(outcome, Committed)
    assert (outcome.step, outcome.folder) == (1, folder / "step_00000001")
    assert outcome.num_bytes == sum(path.stat().st_size for path in outcome.folder.iterdir() if path.name != "manifest.json")
    # Every one of its operations takes 0.1 s, training waits for none of them.
    assert outcome.commit_seconds > 0.1 and outcome.stall_seconds < outcome.commit_seconds / 2
    assert verify(outcome.folder).step == 1


def test_a_snapshot_never_mixes_two_steps(make_saver, engine, folder):
    """What is overwritten the moment that `save` returns, while every write waits, is what was there before."""
    saver = make_saver(slow(0.05))
    state = dict(partitions.local_state(engine, rank=0))
    before = {key: tensor.clone() for key, tensor in state.items()}
    progress = Progress(1, {"row": [3]}, [{"key": "a"}])
    saver.save(progress)
    with torch.no_grad():
        for tensor in state.values():
            tensor.fill_(-1.0)
    progress.data_state["row"].append(4)
    progress.ledger[0]["key"] = "b"
    torch.rand(10)
    saver.finish()
    with torch.no_grad():
        for key, tensor in partitions.local_state(engine, rank=0):
            tensor.copy_(before[key])
    path = folder / "step_00000001"
    read = load_file(path / "rank_00000.safetensors")
    assert [key for key in before if not torch.equal(read[key], before[key].reshape(-1))] == []
    assert (read_data_state(path), read_ledger(path)) == ({"row": [3]}, [{"key": "a"}])


def test_training_races_a_save_and_loses_nothing(make_saver, engine, folder):
    """Steps while every write waits: what is written is the state between the two steps, every time."""
    saver = make_saver(slow(0.05))
    for step in (1, 2, 3):
        before = {key: tensor.reshape(-1).clone() for key, tensor in partitions.local_state(engine, rank=0)}
        saver.save(Progress(step))
        num_steps = 0
        while saver.is_pending or not num_steps:
            train(engine, 0, 1, num_steps, num_steps + 1)
            saver.poll()
            num_steps += 1
        after = dict(partitions.local_state(engine, rank=0))
        assert not any(torch.equal(after[key].reshape(-1), tensor) for key, tensor in before.items())
        read = load_file(folder / f"step_0000000{step}" / "rank_00000.safetensors")
        assert [key for key in before if not torch.equal(read[key], before[key])] == []


def test_a_lease_is_renewed_while_a_save_is_written(make_saver, folder):
    """A save that takes longer than the lease: a second job is refused all the while."""
    lock = RunLock.acquire(folder.parent, lease_seconds=2.0)
    saver = make_saver(slow(0.3), hold=Hold(Fence(lock.number), lock))
    saver.save(Progress(1))
    num_refused = 0
    while saver.is_pending:
        with pytest.raises(CheckpointError, match="in use by"):
            RunLock.acquire(folder.parent, lease_seconds=2.0)
        num_refused += 1
        saver.poll()
    assert num_refused
    assert verify(folder / "step_00000001").fence.number == lock.number
    lock.release()


def test_latest_leads_to_what_was_read_back(make_saver, folder):
    io = Rotten("rank_00000.safetensors")
    saver = make_saver(io)
    saver.save(Progress(1))
    saver.finish()
    assert verify(folder / "latest").step == 1
    io.error_number = 0
    saver.save(Progress(2))
    poll_to_the_end(saver)
    assert verify(folder / "latest").step == 1
    io.error_number = None
    saver.save(Progress(3))
    saver.finish()
    assert (folder / "latest").readlink() == Path("step_00000003")
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    saver.save(Progress(4))
    (outcome,) = saver.finish()
    assert isinstance(outcome, Committed), "a convenience, no reason to fail"


def test_the_memory_for_snapshots_is_told_at_the_start(make_saver, caplog):
    with caplog.at_level("INFO", logger="megamm.checkpoint"):
        make_saver()
    assert re.search(r"rank 0 holds \d+\.\d\d GiB of host memory, \d+\.\d\d GiB of them for snapshots; the node has", caplog.text)


def test_the_next_save_waits_for_the_last_and_reuses_its_memory(make_saver, folder):
    saver = make_saver(slow(0.05))
    num_bytes = saver.snapshot_bytes
    for step in (1, 2, 3):
        saver.save(Progress(step))
    outcomes = saver.finish()
    assert [outcome.step for outcome in outcomes] == [1, 2, 3]
    assert outcomes[1].stall_seconds > 0.15
    assert outcomes[1].stall_seconds > outcomes[0].stall_seconds
    assert saver.snapshot_bytes == num_bytes
    assert names(folder) == ["step_00000001", "step_00000002", "step_00000003"]


def test_waiting_for_each_save_is_the_same_path(make_saver, engine, folder):
    saver = make_saver(asynchronous=False)
    saver.save(Progress(1))
    assert not saver.is_pending
    (outcome,) = saver.poll()
    assert outcome.stall_seconds >= outcome.commit_seconds > 0
    behind = make_saver()
    behind.save(Progress(2))
    behind.finish()
    one, two = (read_manifest(folder / f"step_0000000{step}").files["rank_00000.safetensors"] for step in (1, 2))
    assert one == two


def test_the_memory_for_snapshots_is_the_size_of_the_state(make_saver, engine):
    state = dict(partitions.local_state(engine, rank=0))
    held = make_saver().snapshot_bytes - sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert 0 < held < 20_000, "random states"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("operation", ["make_folder", "create", "write", "sync", "sync_folder", "rename"])
def test_a_failure_is_counted_and_the_next_save_works(make_saver, folder, operation, number):
    io = Broken(operation)
    saver = make_saver(io)
    saver.save(Progress(1))
    saver.finish()
    io.error_number = number
    for expected in (1, 2):
        saver.save(Progress(1 + expected))
        (outcome,) = poll_to_the_end(saver)
        assert isinstance(outcome, Failed)
        assert (outcome.step, outcome.num_in_a_row) == (1 + expected, expected)
    io.error_number = None
    saver.save(Progress(4))
    assert [type(outcome) for outcome in saver.finish()] == [Committed]
    assert names(folder) == ["step_00000001", "step_00000004"]
    io.error_number = number
    saver.save(Progress(5))
    assert poll_to_the_end(saver)[0].num_in_a_row == 1


def test_failures_in_a_row_end_the_run(make_saver, folder):
    io = Broken("write")
    saver = make_saver(io, max_failures=2)
    saver.save(Progress(1))
    saver.finish()
    io.error_number = errno.ENOSPC
    saver.save(Progress(2))
    poll_to_the_end(saver)
    saver.save(Progress(3))
    with pytest.raises(CheckpointError, match=r"step_00000003 was not written .*No space left.* 2 failures in a row") as raised:
        poll_to_the_end(saver)
    assert raised.value.on_all_ranks
    assert names(folder) == ["step_00000001"]
    assert verify(folder / "step_00000001")


def test_the_last_save_is_tried_again_from_the_same_snapshot(make_saver, folder, monkeypatch):
    monkeypatch.setattr("megamm.checkpoint.saver._RETRY_SECONDS", 0.0)
    io = Broken("sync", errno.EIO)
    saver = make_saver(io)
    saver.save(Progress(7))
    poll_to_the_end(saver)
    io.error_number = None
    assert [(type(outcome), outcome.step) for outcome in saver.finish()] == [(Committed, 7)]
    io.error_number = errno.EIO
    saver.save(Progress(8))
    with pytest.raises(CheckpointError, match="3 failures in a row"):
        saver.finish()
    assert names(folder) == ["step_00000007"]


class Rotten(Broken):
    """Bits of the files of one name turn between the write and the disk."""

    def write(self, file, block):
        if self.error_number is not None and Path(file.name).name == self._name:
            block = bytes(byte ^ 1 for byte in block)
        super().write(file, block)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "data_state.json", "manifest.json"])
def test_what_reads_back_damaged_is_set_aside_and_replaces_nothing(make_saver, folder, name):
    io = Rotten(name)
    saver = make_saver(io, keep_last=1)
    saver.save(Progress(1))
    saver.finish()
    io.error_number = 0
    saver.save(Progress(2))
    (outcome,) = poll_to_the_end(saver)
    assert isinstance(outcome, Failed) and "reads back damaged" in outcome.reason
    assert names(folder) == ["step_00000001", "step_00000002.damaged-1"]
    io.error_number = None
    saver.save(Progress(3))
    saver.finish()
    assert names(folder) == ["step_00000002.damaged-1", "step_00000003"]


class Late(Io):
    """A checkpoint's name can be seen some time after the rename was said to be done, as by another client of a network's file system."""

    def __init__(self):
        self.is_done, self.may_be_seen = threading.Event(), threading.Event()

    def rename(self, source, target):
        threading.Thread(target=self._show, args=(source, target)).start()
        self.is_done.set()

    def _show(self, source, target):
        assert self.may_be_seen.wait(60)
        super().rename(source, target)


def test_training_goes_on_while_a_rename_cannot_be_seen_yet(make_saver, engine, folder):
    io = Late()
    saver = make_saver(io)
    saver.save(Progress(1))
    outcomes, num_steps = [], 0
    while num_steps < 5:
        train(engine, 0, 1, num_steps, num_steps + 1)
        outcomes += saver.poll()
        num_steps += io.is_done.is_set()
    assert saver.is_pending and outcomes == []
    io.may_be_seen.set()
    (outcome,) = poll_to_the_end(saver)
    assert isinstance(outcome, Committed)
    assert names(folder) == ["step_00000001"]


def test_older_ones_go_only_once_the_new_one_was_read_back(make_saver, folder):
    saver = make_saver(keep_last=2, keep_every=4)
    for step in range(1, 8):
        saver.save(Progress(step))
    saver.finish()
    assert [step for step, _ in committed(folder)] == [4, 6, 7]


def test_what_dead_owners_left_is_swept_away_without_a_save(engine, world, folder):
    dead = Attempt(folder, 5, Fence(1), 1)
    write_files(dead, {"x": [b"torn"]}, LOCAL)
    with Saver(folder, engine, world, Checkpointing(), hold=Hold(Fence(2))):
        pass
    assert names(folder) == []


def test_an_error_of_all_ranks_still_commits_what_was_under_way(engine, world, folder):
    error = CheckpointError("the data ended")
    error.on_all_ranks = True
    with pytest.raises(CheckpointError), Saver(folder, engine, world, Checkpointing(), io=slow(0.05)) as saver:
        saver.save(Progress(3))
        raise error
    assert [step for step, _ in committed(folder)] == [3]


def test_a_job_that_lost_its_run_commits_nothing_and_ends(make_saver, folder, world):
    run = folder.parent
    old = RunLock.acquire(run, lease_seconds=60.0)
    saver = make_saver(hold=Hold(Fence(old.number), old))
    saver.save(Progress(1))
    saver.finish()
    disown(run, old.number)
    new = RunLock.acquire(run, lease_seconds=60.0)
    saver.save(Progress(2))
    with pytest.raises(LostRun, match=r"was taken over by .* this job must not write to it"):
        saver.finish()
    assert [step for step, _ in committed(folder)] == [1]
    for lock in (new, old):
        lock.release()


def disown(run, number):
    """Make the owner's record say that its process is another one, long gone."""
    path = run / ".lock" / f"{number:08d}.owner"
    path.write_text(sealed(opened(path.read_bytes()) | {"pid_started": 1.0}))
    assert read_owner(run, number).pid_started == 1.0


def test_what_an_old_owner_commits_late_is_passed_over(make_saver, folder, world):
    """The old one passed its last check before the new one came, and renames long after."""
    run = folder.parent
    with hold_run(run, world, lease_seconds=60.0) as first:
        first.started_at(0)
        saver = make_saver(hold=first)
        saver.save(Progress(10))
        saver.finish()
    with hold_run(run, world, lease_seconds=60.0) as second:
        second.started_at(10)
        late = make_saver(hold=Hold(first.fence))
        late.save(Progress(20))
        late.finish()
        assert [step for step, _ in committed(folder)] == [10, 20]
        choice = newest_good(folder, world, hold=second)
        assert choice.folder == folder / "step_00000010"
        saver = make_saver(hold=second)
        saver.save(Progress(20))
        saver.finish()
        assert verify(folder / "step_00000020").fence == second.fence
    assert starts(run) == [(1, 0), (2, 10)]


def on_two_ranks(folder):
    """Beside training; with a full disk on one rank; with a programming error on one rank."""
    world = distributed.start()
    engine = build_engine(2)
    folder = Path(folder)
    found = {}
    io = Broken("write")
    waiting = Checkpointing(asynchronous=False, **KEEP_ALL)
    with (
        Saver(folder / "waited", engine, world, waiting) as waited,
        Saver(folder / "behind", engine, world, Checkpointing(**KEEP_ALL), io=io) as saver,
    ):
        train(engine, world.rank, 2, 0, 3)
        waited.save(Progress(3))
        saver.save(Progress(3))
        outcomes = []
        for step in range(3, 6):
            train(engine, world.rank, 2, step, step + 1)
            outcomes += saver.poll()
        outcomes += saver.finish()
        found["beside_training"] = [[type(outcome).__name__, outcome.step] for outcome in outcomes]
        io.error_number = errno.ENOSPC if world.rank == 1 else None
        saver.save(Progress(6))
        found["full_disk"] = [outcome.reason for outcome in poll_to_the_end(saver)]
        found["left"] = names(folder / "behind")
        distributed.barrier()
        io.error_number = None
        saver.save(Progress(7))
        found["again"] = [outcome.step for outcome in saver.finish()]
        saver._snapshot.blocks = (lambda: 1 / 0) if world.rank == 1 else saver._snapshot.blocks
        saver.save(Progress(8))
        try:
            saver.finish()
        except Exception as error:
            found["mistake"] = [type(error).__name__, str(error)]
    engine.close()
    distributed.stop()
    return found


@pytest.mark.distributed
def test_two_ranks_agree_on_every_save(tmp_path):
    found = run_ranks(on_two_ranks, 2, str(tmp_path))
    first, second = (read_manifest(tmp_path / way / "step_00000003") for way in ("waited", "behind"))
    assert first.files == second.files
    assert first.engine == second.engine
    for rank in found:
        assert rank["beside_training"] == [["Committed", 3]]
        assert len(rank["full_disk"]) == 1 and rank["full_disk"][0].startswith("rank 1: [Errno 28] No space left")
        assert rank["left"] == ["step_00000003"]
        assert rank["again"] == [7]
    assert found[0]["mistake"] == ["MegaMMError", "rank 1 failed with ZeroDivisionError: division by zero"]
    assert found[1]["mistake"] == ["ZeroDivisionError", "division by zero"]
