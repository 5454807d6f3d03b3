import errno
import shutil

import pytest

from megamm.checkpoint.choose import newest_good, require_good
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.manifest import FORMAT, MANIFEST, OtherFormat
from megamm.core.errors import CheckpointError
from tests.support.checkpoints import some_tensors, write_checkpoint
from tests.support.faults import Broken


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, some_tensors())
    return tmp_path


def test_the_newest_is_taken(folder, world):
    choice = newest_good(folder, world)
    assert choice.folder == folder / "step_00000030"
    assert choice.damaged == {}


def test_damaged_ones_are_named_and_passed_over(folder, world):
    (folder / "step_00000030" / MANIFEST).unlink()
    shard = folder / "step_00000020" / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    choice = newest_good(folder, world)
    assert choice.folder == folder / "step_00000010"
    assert "never committed" in choice.damaged["step_00000030"]
    assert "rank_00001.safetensors is damaged" in choice.damaged["step_00000020"]


def test_temporary_folders_are_no_checkpoints(folder, world):
    shutil.copytree(folder / "step_00000030", folder / ".step_00000040.tmp")
    assert newest_good(folder, world).folder == folder / "step_00000030"


def test_none_is_left(folder, world):
    for path in folder.iterdir():
        (path / MANIFEST).write_text("{}")
    choice = newest_good(folder, world)
    assert choice.folder is None
    assert len(choice.damaged) == 3


def test_another_versions_checkpoint_ends_the_start(folder, world, monkeypatch):
    """Passed over, it would be set aside as damaged and its steps trained again."""
    monkeypatch.setattr("megamm.checkpoint.manifest.FORMAT", FORMAT + 1)
    newer = write_checkpoint(folder, 40, some_tensors())
    monkeypatch.undo()
    for refuse in (lambda: newest_good(folder, world, hold=Hold()), lambda: require_good(newer, world)):
        with pytest.raises(OtherFormat, match=f"step_00000040 has format {FORMAT + 1}") as raised:
            refuse()
        assert raised.value.on_all_ranks
    assert newer.is_dir()


def test_a_folder_that_does_not_exist_has_none(tmp_path, world):
    assert newest_good(tmp_path / "checkpoints", world).folder is None


def test_insisting_on_a_damaged_one_fails(folder, world):
    (folder / "step_00000020" / "ledger.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000020: ledger\.jsonl"):
        require_good(folder / "step_00000020", world)
    assert require_good(folder / "step_00000010", world) == folder / "step_00000010"


def damage(path):
    shard = path / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")


def test_who_holds_the_run_sets_damaged_ones_aside(folder, world):
    damage(folder / "step_00000030")
    assert newest_good(folder, world).folder == folder / "step_00000020"
    assert (folder / "step_00000030").is_dir(), "only looked"
    for _ in range(2):
        choice = newest_good(folder, world, hold=Hold())
        assert choice.folder == folder / "step_00000020"
    write_checkpoint(folder, 30, some_tensors())
    damage(folder / "step_00000030")
    newest_good(folder, world, hold=Hold())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step_00000010", "step_00000020", "step_00000030.damaged-1", "step_00000030.damaged-2"]
    assert (folder / "latest").resolve() == folder / "step_00000020"
    assert (folder / "step_00000030.damaged-1" / MANIFEST).is_file()


def test_a_run_whose_checkpoints_are_all_damaged_never_looks_new(folder, world):
    damage(folder / "step_00000030")
    newest_good(folder, world, hold=Hold())
    for name in ("step_00000010", "step_00000020"):
        damage(folder / name)
    for _ in range(2):
        choice = newest_good(folder, world, hold=Hold())
        assert choice.folder is None
        assert sorted(choice.damaged) == ["step_00000010", "step_00000020", "step_00000030.damaged-1"]
    for name in ("step_00000010", "step_00000020"):
        shutil.rmtree(folder / name)
    assert newest_good(folder, world, hold=Hold()).damaged == {"step_00000030.damaged-1": "it was set aside earlier"}


def test_what_cannot_be_renamed_is_passed_over_all_the_same(folder, world, caplog):
    damage(folder / "step_00000030")
    choice = newest_good(folder, world, hold=Hold(), io=Broken("rename", errno.EROFS))
    assert choice.folder == folder / "step_00000020"
    assert "step_00000030" in choice.damaged and (folder / "step_00000030").is_dir()
