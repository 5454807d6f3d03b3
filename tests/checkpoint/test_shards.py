import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamm.checkpoint.shards import write_file, write_shard
from megamm.core.files import digest_file
from tests.support.faults import WatchedIo, recording


def test_the_library_reads_what_was_written(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "flag": torch.tensor([True, False]),
        "empty": torch.empty(0),
        "turned": torch.randn(4, 6).t(),
    }
    write_shard(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_the_digest_is_that_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    facts = write_shard(path, {"a": torch.randn(1000), "b": torch.arange(3)})
    assert facts.digest == digest_file(path)
    assert facts.num_bytes == path.stat().st_size


def test_wide_elements_stay_aligned_beside_odd_ones(tmp_path):
    path = tmp_path / "x.safetensors"
    write_shard(path, {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(4, dtype=torch.float64), "c": torch.randn(3)})
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    assert header_bytes % 8 == 0
    assert data[8 : 8 + header_bytes].index(b'"b"') < data[8 : 8 + header_bytes].index(b'"c"') < data[8 : 8 + header_bytes].index(b'"a"')


def test_small_files_are_hashed_too(tmp_path):
    facts = write_file(tmp_path / "x", [b"a", b"bc"])
    assert (facts.num_bytes, facts.digest) == (3, digest_file(tmp_path / "x"))


def test_a_full_disk_is_an_error():
    with pytest.raises(OSError, match="No space left"):
        write_file(Path("/dev/full"), [b"x" * (1 << 20)])


def test_a_large_file_is_synced_behind_its_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("megamm.checkpoint.shards._SYNC_BYTES", 1000)
    operations = []
    facts = write_file(tmp_path / "x", [b"ab" * 500] * 20, recording(operations))
    assert facts.digest == digest_file(tmp_path / "x")
    names = [name for name, _ in operations]
    assert names.count("write") == 20 and names.count("sync") >= 2 and names[-1] == "sync"


def test_an_error_behind_the_writing_is_an_error(tmp_path, monkeypatch):
    """The disk lost a page once; the last sync, to which nobody reports it any more, works."""
    monkeypatch.setattr("megamm.checkpoint.shards._SYNC_BYTES", 1000)
    count = iter(range(100))

    def lose_one(number, name, path):
        if name == "sync" and next(count) == 0:
            raise OSError(errno.EIO, "lost a page")

    with pytest.raises(OSError, match="lost a page"):
        write_file(tmp_path / "x", [b"ab" * 500] * 20, WatchedIo(lose_one))
