import errno
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamm.checkpoint.manifest import (
    DATA_STATE,
    FORMAT,
    LEDGER,
    MANIFEST,
    FileFacts,
    OtherFormat,
    check_file,
    committed,
    read_data_state,
    read_ledger,
    read_manifest,
    verify,
)
from megamm.core.errors import CheckpointError
from megamm.core.files import canonical_json, digest_file, digest_text
from tests.support.checkpoints import some_tensors, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path, 100, some_tensors())


def test_a_good_checkpoint_verifies(checkpoint):
    manifest = verify(checkpoint)
    assert (manifest.step, manifest.world_size, len(manifest.files)) == (100, 2, 4)
    assert manifest.parameters[0].shape == (3, 7)


def test_a_checkpoint_under_another_steps_name_is_refused(checkpoint):
    for name in ("step_00000101", "step_101"):
        with pytest.raises(CheckpointError, match=rf"{name} is of step 100, by its manifest.json; rename it step_00000100"):
            verify(checkpoint.rename(checkpoint.with_name(name)))
        checkpoint.with_name(name).rename(checkpoint)
    for name in ("step_100", "kept", "step_00000100.stale-1"):
        assert verify(checkpoint.rename(checkpoint.with_name(name))).step == 100
        checkpoint.with_name(name).rename(checkpoint)


def test_the_manifest_round_trips(checkpoint):
    manifest = read_manifest(checkpoint)
    (checkpoint / MANIFEST).write_text(manifest.to_text())
    assert read_manifest(checkpoint) == manifest


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_in_any_file_is_found(checkpoint, data):
    path = data.draw(st.sampled_from(sorted(checkpoint.iterdir())))
    original = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        with pytest.raises(CheckpointError, match=path.name):
            verify(checkpoint)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("keep", [0, 1, -1])
@pytest.mark.parametrize("name", ["rank_00001.safetensors", "data_state.json", MANIFEST])
def test_a_cut_file_is_found(checkpoint, name, keep):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=name):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "ledger.jsonl", MANIFEST])
def test_a_missing_file_is_found(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify(checkpoint)


def test_a_shard_of_another_step_is_found(checkpoint, tmp_path):
    other = write_checkpoint(tmp_path, 200, some_tensors(), fill=1.0)
    (checkpoint / "rank_00001.safetensors").write_bytes((other / "rank_00001.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="rank_00001"):
        verify(checkpoint)


def test_a_manifest_edited_by_hand_is_refused(checkpoint):
    body = json.loads((checkpoint / MANIFEST).read_text())
    body["step"] = 101
    (checkpoint / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="digest"):
        read_manifest(checkpoint)


def rewrite(checkpoint, **changes):
    """As another version, or somebody who knows how, would write it: sealed, None for what it does not have."""
    body = {key: value for key, value in (json.loads((checkpoint / MANIFEST).read_text()) | changes).items() if value is not None}
    body.pop("digest")
    body["digest"] = digest_text(canonical_json(body))
    (checkpoint / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("number", [1, FORMAT - 1, FORMAT + 1, None])
def test_another_format_is_refused_and_is_no_damage(checkpoint, number):
    rewrite(checkpoint, format=number, software={"megamm": "9.9"})
    with pytest.raises(OtherFormat, match=rf"has format {number}, megamm .* reads {FORMAT}; load it with megamm 9\.9"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_manifest_names_the_files_of_its_ranks_and_no_others(checkpoint, world_size):
    rewrite(checkpoint, world_size=world_size)
    with pytest.raises(CheckpointError, match=rf"of {world_size} ranks? is wrong about rank_0000[12]\.safetensors"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("changes", [{"files": None}, {"files": []}, {"world_size": "2"}, {"parameters": [{"name": "a"}]}, {"later": 1}])
def test_a_manifest_that_is_sealed_and_holds_something_else_is_refused(checkpoint, changes):
    rewrite(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json holds something else"):
        read_manifest(checkpoint)


def test_a_manifest_that_the_disk_does_not_give_is_damage(checkpoint):
    """The kernel's own file of this process's memory gives an I/O error for its first page, as a bad sector does."""
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read \(Input/output error\)"):
        read_manifest(checkpoint)


def test_a_file_outside_of_the_checkpoint_is_never_looked_at(checkpoint):
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    rewrite(checkpoint, files=files | {"../secret": {"num_bytes": 1, "digest": "0"}})
    with pytest.raises(CheckpointError, match=r"is wrong about \.\./secret"):
        read_manifest(checkpoint)


def test_a_manifest_without_an_end_of_brackets_is_refused(checkpoint):
    (checkpoint / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(checkpoint)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="step_00000007 does not exist"):
        read_manifest(tmp_path / "step_00000007")


def test_only_folders_with_a_steps_name_count(tmp_path):
    for step in (20, 3, 100):
        write_checkpoint(tmp_path, step, some_tensors())
    for name in (".step_00000200.tmp", "step_00000300.bak", ".step_00000003.deleted"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000400").write_text("a file")
    assert [step for step, _ in committed(tmp_path)] == [3, 20, 100]


def test_a_ledger_holds_keys_of_any_letters(checkpoint):
    entries = [{"key": "a\u2028b"}, {"key": "c\x85"}]
    (checkpoint / LEDGER).write_text("".join(canonical_json(entry) + "\n" for entry in entries))
    assert read_ledger(checkpoint) == entries


@pytest.mark.parametrize(("name", "read"), [(DATA_STATE, read_data_state), (LEDGER, read_ledger)])
def test_files_that_are_no_json_are_named(checkpoint, name, read):
    (checkpoint / name).write_bytes(b"\x80\x04 no JSON")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        read(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        read(checkpoint)


def test_a_read_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    """A file server that stumbles must not cost a run its newest checkpoint."""
    (tmp_path / "weights").write_bytes(b"some bytes")
    facts = FileFacts(10, digest_file(tmp_path / "weights"))
    failures = iter([OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")])

    def stumbling(path):
        for failure in failures:
            raise failure
        return digest_file(path)

    monkeypatch.setattr("megamm.checkpoint.manifest.digest_file", stumbling)
    monkeypatch.setattr("megamm.checkpoint.manifest._PAUSES_SECONDS", (0.0, 0.0))
    check_file(tmp_path, "weights", facts)
    failures = iter([OSError(errno.EIO, "Input/output error")] * 3)
    with pytest.raises(CheckpointError, match=r"weights cannot be read \(Input/output error\)"):
        check_file(tmp_path, "weights", facts)
