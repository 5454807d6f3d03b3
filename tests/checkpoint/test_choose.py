import shutil

import pytest

from megamm.checkpoint.choose import newest_good, require_good
from megamm.checkpoint.manifest import MANIFEST
from megamm.core.errors import CheckpointError
from tests.support.checkpoints import some_tensors, write_checkpoint


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


def test_a_folder_that_does_not_exist_has_none(tmp_path, world):
    assert newest_good(tmp_path / "checkpoints", world).folder is None


def test_insisting_on_a_damaged_one_fails(folder, world):
    (folder / "step_00000020" / "ledger.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000020: ledger\.jsonl"):
        require_good(folder / "step_00000020", world)
    assert require_good(folder / "step_00000010", world) == folder / "step_00000010"
