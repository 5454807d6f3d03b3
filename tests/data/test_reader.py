"""Reading local shards: files that changed under their names, descriptors that went stale, few open files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamm.core.errors import DataError
from megamm.data.reader import LocalReader, read_exactly


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("megamm.data.reader._RETRY_DELAYS_SECONDS", (0.0,))


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
