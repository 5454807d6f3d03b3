"""The commit layer without an engine: killed and failing at every operation, what is left is whole."""

import errno
import os
import shutil

import pytest
import torch

from megamm.checkpoint.commit import Attempt, commit, sweep, write_files
from megamm.checkpoint.fence import Fence
from megamm.checkpoint.io import LOCAL
from megamm.checkpoint.lock import LostRun
from megamm.checkpoint.manifest import DATA_STATE, LEDGER, Manifest, committed, rank_file, verify
from megamm.checkpoint.retain import retire
from megamm.config.schema import Checkpointing
from tests.support.checkpoints import shard_bytes, write_checkpoint
from tests.support.faults import KilledIo, failing, recording

NUM_RANKS = 2


def shard(rank, step):
    return shard_bytes({"weight/a": torch.full((1000,), float(step)), "random/x": torch.arange(rank, 40)})


def save(folder, step, io=LOCAL, *, fence=1, number=1, check_owner=lambda: None):
    """What the ranks of a job do with files, one after the other."""
    attempt = Attempt(folder, step, Fence(fence), number)
    sweep(attempt, io)
    files = {}
    for rank in range(NUM_RANKS):
        own = {rank_file(rank): [shard(rank, step)]} | ({DATA_STATE: [b'{"row":7}'], LEDGER: [b""]} if rank == 0 else {})
        files |= write_files(attempt, own, io)
    manifest = Manifest(step=step, world_size=NUM_RANKS, files=files, parameters=(), engine={}, fence=Fence(fence))
    commit(attempt, manifest, io, check_owner)
    retire(folder, step, Checkpointing(keep_last=1), io)


@pytest.fixture
def folder(tmp_path):
    """An older checkpoint, what a dead owner left behind, and a deletion that was cut short."""
    folder = tmp_path / "run" / "checkpoints"
    save(folder, 10)
    write_files(Attempt(folder, 20, Fence(1), 2), {"rank_00000.safetensors": [b"torn"]}, LOCAL)
    shutil.copytree(folder / "step_00000010", folder / ".step_00000005.deleted")
    return folder


def operations_of_a_save(folder):
    """Every file operation of a save, in a copy of the folder."""
    operations = []
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    save(copy, 20, recording(operations), fence=2)
    shutil.rmtree(copy)
    return operations


def killed(folder, at, moment):
    """Save in a child process that dies there; returns whether it did."""
    child = os.fork()
    if child == 0:
        save(folder, 20, KilledIo(at, moment), fence=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_the_manifest_comes_after_everything_and_the_name_after_the_manifest(folder):
    operations = operations_of_a_save(folder)
    temporary = ".step_00000020.2-1.tmp"
    last_write = max(index for index, (name, _) in enumerate(operations) if name == "write")
    assert operations[last_write : last_write + 5] == [
        ("write", "manifest.json"),
        ("sync", "manifest.json"),
        ("sync_folder", temporary),
        ("rename", temporary),
        ("sync_folder", "copy"),
    ]
    written = [path for name, path in operations if name == "create"]
    assert written == ["rank_00000.safetensors", DATA_STATE, LEDGER, "rank_00001.safetensors", "manifest.json"]
    assert [path for name, path in operations if name == "sync"] == written


def test_the_first_save_of_a_run_syncs_the_names_of_its_folders(tmp_path):
    """Else a power cut takes the folder of all checkpoints, whatever was synced in it."""
    operations = []
    save(tmp_path / "runs" / "mine" / "checkpoints", 10, recording(operations))
    assert operations[:4] == [
        ("make_folder", ".step_00000010.1-1.tmp"),
        ("sync_folder", "mine"),
        ("sync_folder", "runs"),
        ("sync_folder", tmp_path.name),
    ]


def test_a_kill_at_any_operation_leaves_whole_checkpoints_and_nothing_else(folder):
    """Before, in the middle of, and after each operation of a save and of the deletion that follows it."""
    num_operations = len(operations_of_a_save(folder))
    num_survived_new = num_killed = 0
    for at in range(num_operations):
        for moment in ("before", "middle", "after"):
            trial = folder.parent / "trial"
            shutil.copytree(folder, trial)
            died = killed(trial, at, moment)
            assert died or moment == "middle", (at, moment)
            num_killed += died
            steps = [verify(path).step for _, path in committed(trial)]
            assert steps in ([10], [10, 20], [20]), (at, moment)
            num_survived_new += 20 in steps
            save(trial, 30, fence=3)
            assert sorted(path.name for path in trial.iterdir()) == ["step_00000030"], (at, moment)
            shutil.rmtree(trial)
    assert num_killed >= 50 and 0 < num_survived_new < num_killed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_at_any_operation_leaves_whole_checkpoints_and_the_next_save_works(folder, number):
    for at in range(len(operations_of_a_save(folder))):
        trial = folder.parent / "trial"
        shutil.copytree(folder, trial)
        try:
            save(trial, 20, failing(at, number), fence=2)
        except OSError as error:
            assert error.errno == number
        assert [verify(path).step for _, path in committed(trial)] in ([10], [10, 20], [20]), at
        save(trial, 20, fence=2, number=2)
        assert [path.name for path in trial.iterdir() if path.name.startswith(".")] == [], at
        assert verify(trial / "step_00000020").files
        shutil.rmtree(trial)


def test_an_owner_that_lost_the_run_commits_nothing(folder):
    def lost():
        raise PermissionError("lost")

    with pytest.raises(PermissionError, match="lost"):
        save(folder, 20, fence=2, check_owner=lost)
    assert [step for step, _ in committed(folder)] == [10]


def test_a_step_that_is_there_already_is_set_aside_not_replaced(folder):
    write_checkpoint(folder, 20, {"a": torch.ones(3)})
    save(folder, 20, fence=2)
    assert (folder / "step_00000020.stale-1" / "manifest.json").is_file()
    assert verify(folder / "step_00000020").fence == Fence(2)


def test_what_a_later_owner_committed_is_not_pushed_aside(folder):
    """An owner that passed its last check, slept, and finds the step there that the next owner saved."""
    save(folder, 20, fence=2)
    with pytest.raises(LostRun, match="was committed by owner 2 of the run; owner 1 must not write it"):
        save(folder, 20, fence=1, number=3)
    assert verify(folder / "step_00000020").fence == Fence(2)
    (folder / "step_00000020" / "manifest.json").unlink()
    save(folder, 20, fence=1, number=4)
    assert (folder / "step_00000020.stale-1").is_dir()


def test_only_earlier_attempts_and_owners_are_swept(folder):
    later = Attempt(folder, 40, Fence(3), 1)
    write_files(later, {"x": [b"live"]}, LOCAL)
    for foreign in (".step_00000050.tmp", ".step_note", "step_00000050.damaged-1", ".mine"):
        (folder / foreign).mkdir()
    sweep(Attempt(folder, 30, Fence(2), 1), LOCAL)
    names = {path.name for path in folder.iterdir()}
    expected = {".step_00000050.tmp", ".step_note", "step_00000050.damaged-1", ".mine", "step_00000010", later.temporary.name}
    assert names == expected
