import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.checkpoint import retain as module
from megamm.checkpoint.manifest import MANIFEST, committed
from megamm.checkpoint.retain import retain, superseded
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


def test_old_ones_are_deleted(folder, world):
    assert retain(folder, Checkpointing(keep_last=2, keep_every=20), world) == ["step_00000010"]
    assert [step for step, _ in committed(folder)] == [20, 30, 40]
    assert retain(folder, Checkpointing(keep_last=1), world) == ["step_00000020", "step_00000030"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000040"]


def test_nothing_is_deleted_when_the_newest_is_damaged(folder, world):
    (folder / "step_00000040" / MANIFEST).unlink()
    assert retain(folder, Checkpointing(keep_last=1), world) == []
    assert len(committed(folder)) == 4


def test_a_rank_with_a_late_listing_follows_rank_0(folder, world, monkeypatch):
    everything = [[step, f"step_{step:08d}"] for step in (10, 20, 30, 40)]
    monkeypatch.setattr(module, "committed", lambda _: committed(folder)[:3])
    monkeypatch.setattr(module, "broadcast_json", lambda _: everything)
    assert retain(folder, Checkpointing(keep_last=1), world) == ["step_00000010", "step_00000020", "step_00000030"]


def test_a_deletion_that_was_cut_short_is_finished(folder, world):
    for name in (".step_00000005.deleted", ".step_00000010.replaced"):
        (folder / name).mkdir()
        (folder / name / "rank_00000.safetensors").write_bytes(b"x")
    retain(folder, Checkpointing(keep_last=3), world)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000020", "step_00000030", "step_00000040"]
