import pytest

from megamm.config import Reading
from megamm.core.errors import DataError
from megamm.data.shards import beside
from megamm.data.shards.beside import read_beside
from megamm.data.shards.places import RemoteShard
from tests.support.http_server import FileServer

READING = Reading(timeout_seconds=5.0, retries=2)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "files" / "shop"
    folder.mkdir(parents=True)
    (folder / "list").write_bytes(b"\x00 of bytes")
    (folder / "empty").touch()
    return folder


@pytest.fixture
def remote(folder, tmp_path):
    with FileServer(folder.parent) as server:
        yield RemoteShard.at(f"{server.url}/shop/a.tar?key=secret", tmp_path / "sidecars")


def test_a_file_beside_a_shard_is_read_wherever_it_lies(folder, remote):
    for shard in (folder / "a.tar", remote):
        assert read_beside(shard, "list", READING) == b"\x00 of bytes"
        assert read_beside(shard, "empty", READING) == b""
        assert read_beside(shard, "absent", READING) is None


def test_a_file_that_can_be_no_list_is_not_fetched(remote, monkeypatch):
    monkeypatch.setattr(beside, "_MAX_BYTES", 3)
    with pytest.raises(DataError, match=r"list beside shard http\S+/a\.tar has 10 bytes, more than 3"):
        read_beside(remote, "list", READING)


def test_a_folder_of_that_name_is_named(tmp_path):
    (tmp_path / "list").mkdir()
    with pytest.raises(DataError, match=r"list cannot be read \(Is a directory\)"):
        read_beside(tmp_path / "a.tar", "list", READING)
