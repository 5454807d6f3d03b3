"""Reading local shards: files that changed under their names, descriptors that went stale, few open files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megamm.core.errors import DataError
from megamm.data.ledger import BadSample
from megamm.data.shards.index import write_index
from megamm.data.shards.reader import LocalReader, ShardPool, read_exactly
from tests.support.shards import as_files, text_document, write_tar


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("megamm.data.shards.reader._RETRY_DELAYS_SECONDS", (0.0,))


def shards_of(folder: Path, num_shards: int) -> list[Path]:
    paths = [folder / f"{number}.tar" for number in range(num_shards)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    return paths


def test_a_descriptor_that_went_stale_is_opened_anew(tmp_path):
    (path,) = shards_of(tmp_path, 1)
    reader = LocalReader()
    # What a network file system does to an open file (ESTALE), a descriptor that cannot be read does here (EBADF).
    reader._files[path] = (tmp_path / "other").open("wb", buffering=0)
    assert read_exactly(reader, path, 10, 20) == bytes(20)


def test_few_files_stay_open(tmp_path):
    reader = LocalReader(max_open_files=2)
    for number, path in enumerate(2 * shards_of(tmp_path, 5)):
        assert reader.read(path, 98, 10) == bytes([number % 5]) * 2
        assert len(reader._files) <= 2
    reader.close()
    assert not reader._files


def test_a_shard_that_became_shorter_or_went_missing_is_no_bad_sample(tmp_path):
    (path,) = shards_of(tmp_path, 1)
    with pytest.raises(DataError, match="changed since it was indexed: 2 of 10 bytes at 98") as error:
        read_exactly(LocalReader(), path, 98, 10)
    assert type(error.value) is DataError
    with pytest.raises(DataError, match="does not exist any more") as error:
        read_exactly(LocalReader(), tmp_path / "gone.tar", 0, 10)
    assert type(error.value) is DataError


def _indexed(folder: Path) -> tuple[Path, bytes]:
    """A shard of two samples, and bytes of as many for another one."""
    tar = write_tar(folder / "x.tar", {name: as_files(text_document(f"plain words of {name}")) for name in ("a", "b")})
    write_index(tar)
    return tar, tar.read_bytes().replace(b"plain words", b"other words")


def _replace(tar: Path, content: bytes) -> None:
    new = tar.with_suffix(".new")
    new.write_bytes(content)
    new.replace(tar)


def _modify(tar: Path, content: bytes) -> None:
    before = tar.stat().st_mtime_ns
    tar.write_bytes(content)
    # File systems keep times in steps of a few milliseconds.
    os.utime(tar, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize(("change", "max_open_files"), [(_replace, 1), (_modify, 1), (_modify, 8)])
def test_a_shard_that_becomes_another_of_the_same_size_is_no_bad_sample(tmp_path, change, max_open_files):
    """Also where its file was closed in between to open others: every sample after it would be said to be bad."""
    tar, other = _indexed(tmp_path)
    reader = LocalReader(max_open_files)
    shard = ShardPool(reader).shard(tar)
    shard.sample(0)
    change(tar, other)
    for path in shards_of(tmp_path, 2):
        reader.read(path, 0, 1)
    with pytest.raises(DataError, match=r"x\.tar was replaced or modified while it was read; .*run `megamm data index") as error:
        shard.sample(1)
    assert type(error.value) is DataError


def test_bytes_that_differ_in_an_unchanged_file_are_a_bad_sample(tmp_path):
    """Bit rot changes no time and no inode; nor is there anything to compare with before the first read."""
    tar, other = _indexed(tmp_path)
    before = tar.stat()
    shard = ShardPool(LocalReader()).shard(tar)
    shard.sample(0)
    tar.write_bytes(other)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(BadSample, match="the bytes of b"):
            shard.sample(1)
    _replace(tar, other)
    with pytest.raises(BadSample, match="the bytes of b"):
        ShardPool(LocalReader()).shard(tar).sample(1)
