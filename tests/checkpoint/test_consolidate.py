import pytest
import torch

from megamm.checkpoint.consolidate import consolidate
from megamm.checkpoint.load import Slices, check_model
from megamm.checkpoint.manifest import ParameterEntry, read_data_state, read_ledger, read_manifest
from megamm.core.errors import CheckpointError
from tests.support.checkpoints import shard_bytes, some_tensors, write_checkpoint


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_whole_tensors_come_back_from_any_number_of_ranks(tmp_path, num_ranks):
    tensors = some_tensors()
    whole = dict(consolidate(write_checkpoint(tmp_path, 5, tensors, num_ranks=num_ranks)))
    assert list(whole) == [*tensors, "steps_seen"]
    assert all(torch.equal(whole[name], tensors[name]) for name in tensors)
    assert whole["steps_seen"].tolist() == [5]


def test_weights_are_float32_whatever_was_stored(tmp_path):
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in some_tensors().items()}
    whole = dict(consolidate(write_checkpoint(tmp_path, 5, tensors)))
    assert all(whole[name].dtype == torch.float32 and torch.equal(whole[name], tensors[name].float()) for name in tensors)


def test_a_slice_beyond_the_end_is_empty(tmp_path):
    path = write_checkpoint(tmp_path, 5, some_tensors(), num_ranks=8)
    with Slices(path, read_manifest(path)) as slices:
        assert slices.read("weight/b.scale", 1, 1).shape == (0,)


def test_data_state_and_ledger_come_back(tmp_path):
    path = write_checkpoint(tmp_path, 5, some_tensors())
    assert read_data_state(path) == {"row": 3}
    assert [entry["key"] for entry in read_ledger(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: [*table, ParameterEntry("c.weight", (2,), "bfloat16", "trainable")], "it has no c.weight"),
        (lambda table: table[1:], "a.weight is not in this one"),
        (lambda table: [ParameterEntry("a.weight", (7, 3), "bfloat16", "trainable"), *table[1:]], r"a.weight is trainable \[3, 7\] there"),
        (lambda table: [ParameterEntry("a.weight", (3, 7), "bfloat16", "frozen"), *table[1:]], r"frozen \[3, 7\] here"),
    ],
)
def test_another_model_is_refused_by_its_first_difference(tmp_path, change, message):
    path = write_checkpoint(tmp_path, 5, some_tensors())
    manifest = read_manifest(path)
    with pytest.raises(CheckpointError, match=message):
        check_model(path, manifest, change(list(manifest.parameters)))


def test_another_precision_is_the_same_model(tmp_path):
    path = write_checkpoint(tmp_path, 5, some_tensors())
    manifest = read_manifest(path)
    table = [ParameterEntry(entry.name, entry.shape, "float32", entry.kind) for entry in manifest.parameters]
    check_model(path, manifest, table)


def test_a_shard_that_is_none_is_named(tmp_path):
    """As after a manifest that somebody else wrote: the digest is right."""
    path = write_checkpoint(tmp_path, 5, some_tensors())
    (path / "rank_00001.safetensors").write_bytes(b"\x80\x04 no shard")
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors cannot be read"):
        list(consolidate(path))
    (path / "rank_00001.safetensors").write_bytes(shard_bytes({"weight/other": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors cannot be read .*a\.weight"):
        list(consolidate(path))
