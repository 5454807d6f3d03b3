import errno
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.checkpoint.io import Io
from megamm.checkpoint.manifest import MANIFEST, committed
from megamm.checkpoint.retain import retire, superseded
from megamm.config.schema import Checkpointing
from tests.support.checkpoints import some_tensors, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step, some_tensors())
    return tmp_path


@given(st.lists(st.integers(0, 500), unique=True).map(sorted), st.integers(1, 4), st.integers(0, 50))
def test_what_stays_is_what_the_settings_say(steps, keep_last, keep_every):
    gone = superseded(steps, Checkpointing(keep_last=keep_last, keep_every=keep_every))
    kept = [step for step in steps if step not in gone]
    assert kept[-keep_last:] == steps[-keep_last:]
    assert not keep_every or all(step % keep_every for step in gone)
    assert all(step in steps[-keep_last:] or (keep_every and step % keep_every == 0) for step in kept)


def test_old_ones_are_deleted(folder):
    assert retire(folder, 40, Checkpointing(keep_last=2, keep_every=20)) == ["step_00000010"]
    assert [step for step, _ in committed(folder)] == [20, 30, 40]
    assert retire(folder, 40, Checkpointing(keep_last=1)) == ["step_00000020", "step_00000030"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000040"]


def test_only_what_a_verified_one_replaces_is_deleted(folder):
    """What is later than the verified one stays, verified or not, and does not count as kept."""
    assert retire(folder, 20, Checkpointing(keep_last=1)) == ["step_00000010"]
    assert retire(folder, 35, Checkpointing(keep_last=1)) == []
    assert [step for step, _ in committed(folder)] == [20, 30, 40]


def test_what_was_set_aside_stays(folder):
    (folder / "step_00000010").rename(folder / "step_00000010.damaged-1")
    assert retire(folder, 40, Checkpointing(keep_last=1)) == ["step_00000020", "step_00000030"]
    assert (folder / "step_00000010.damaged-1" / MANIFEST).is_file()


class ReadOnly(Io):
    """Refuses as a mount does that turned read-only."""

    def rename(self, source, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))


class Sticky(Io):
    """Refuses to rename one folder, as the owner of another user's files would."""

    def rename(self, source, target):
        if source.name == "step_00000010":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        super().rename(source, target)


class Unsynced(Io):
    """Cannot say that new names are on the disk."""

    def sync_folder(self, path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_one_that_cannot_be_deleted_keeps_no_other(folder, caplog):
    """Only what went is said to have gone."""
    caplog.set_level(logging.WARNING, "megamm")
    assert retire(folder, 40, Checkpointing(keep_last=2), Sticky()) == ["step_00000020"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000010", "step_00000030", "step_00000040"]
    assert "step_00000010 is superseded and stays for now: [Errno 13]" in caplog.text


def test_bytes_stay_until_their_names_are_surely_gone(folder, caplog):
    """After a power cut a folder may have its old name again, and must then be whole."""
    caplog.set_level(logging.WARNING, "megamm")
    assert retire(folder, 40, Checkpointing(keep_last=3), Unsynced()) == ["step_00000010"]
    assert (folder / ".step_00000010.deleted" / MANIFEST).is_file()
    assert ".step_00000010.deleted keep their bytes for now: [Errno 5]" in caplog.text


def test_what_cannot_be_deleted_stays_and_is_said(folder, caplog):
    caplog.set_level(logging.WARNING, "megamm")
    assert retire(folder, 40, Checkpointing(keep_last=1), ReadOnly()) == []
    assert len(committed(folder)) == 4
    assert "Read-only file system" in caplog.text
