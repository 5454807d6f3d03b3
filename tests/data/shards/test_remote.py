"""Remote bytes are the shard's bytes, whatever the server does; or an error that names the shard."""

from __future__ import annotations

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from megamm.config import Reading
from megamm.core.errors import ConfigError, DataError, UnreachableData
from megamm.data.shards.places import RemoteShard
from megamm.data.shards.remote import RemoteReader, open_reader
from tests.support.http_server import BODY_FAULTS, FAULTS, FileServer
from tests.support.s3_server import client, s3_server, upload

SIZE = 300_000
READING = Reading(block_bytes=4096, buffer_bytes=64 * 4096, read_ahead_blocks=4, timeout_seconds=5.0, retries=3)
FAST = Reading(block_bytes=4096, buffer_bytes=64 * 4096, read_ahead_blocks=0, timeout_seconds=0.2, retries=2)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("megamm.data.shards.fetching._FIRST_DELAY_SECONDS", 0.01)


@pytest.fixture
def content(tmp_path) -> bytes:
    (tmp_path / "files").mkdir()
    content = random.Random(0).randbytes(SIZE)
    (tmp_path / "files/x.tar").write_bytes(content)
    return content


@pytest.fixture
def server(tmp_path, content):
    with FileServer(tmp_path / "files") as server:
        yield server


def shard_of(server: FileServer, name: str = "x.tar") -> RemoteShard:
    return RemoteShard.at(f"{server.url}/{name}", Path("sidecars"))


def test_any_stretch_is_the_files(server, content):
    rng = random.Random(1)
    with closing(RemoteReader(READING)) as reader:
        shard = shard_of(server)
        assert reader.size(shard) == SIZE
        spans = [(0, SIZE), (SIZE - 1, 10), (SIZE, 5), (4095, 2), (0, 1), (8192, 4096)]
        spans += [(rng.randrange(SIZE), rng.randrange(20_000)) for _ in range(200)]
        for offset, size in spans:
            assert reader.read(shard, offset, size) == content[offset : offset + size]


def test_neighbouring_blocks_are_one_request(server, content):
    with closing(RemoteReader(FAST)) as reader:
        assert reader.read(shard_of(server), 5000, 20_000) == content[5000:25_000]
        assert [one[1:] for one in server.requests] == [(0, 1), (4096, 28_672)]
        assert reader.read(shard_of(server), 6000, 1000) == content[6000:7000]
        assert len(server.requests) == 2


def test_who_reads_in_order_finds_the_next_blocks_there(server, content):
    with closing(RemoteReader(READING)) as reader:
        shard = shard_of(server)
        reader.read(shard, 0, 100)
        deadline = time.monotonic() + 5
        while len(server.requests) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(one[1:] for one in server.requests) == [(0, 1), (0, 4096), (4096, 5 * 4096)]
        assert reader.read(shard, 4096, 4096) == content[4096:8192]
        assert (4096, 8192) not in [one[1:] for one in server.requests]


def test_reading_at_random_fetches_nothing_ahead(server):
    with closing(RemoteReader(READING)) as reader:
        for block in (50, 10, 30, 70, 20):
            reader.read(shard_of(server), block * 4096, 10)
        assert len(server.requests) == 6


def test_memory_stays_below_its_bound(server, content):
    with closing(RemoteReader(READING)) as reader:
        for offset in range(0, SIZE, 3000):
            assert reader.read(shard_of(server), offset, 3000) == content[offset : offset + 3000]
            assert reader._num_bytes <= READING.buffer_bytes
            with reader._lock:
                assert reader._num_bytes == sum(block.size for block in reader._blocks.values())


def test_threads_that_want_the_same_block_share_one_request(server, content):
    server.delay_seconds = 0.1
    with closing(RemoteReader(FAST)) as reader, ThreadPoolExecutor(8) as pool:
        shard = shard_of(server)
        reader.size(shard)
        parts = list(pool.map(lambda _: reader.read(shard, 40_960, 4096), range(8)))
        assert parts == [content[40_960:45_056]] * 8
        assert len(server.requests) == 2


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind not in ("403", "404", "416")])
def test_what_passes_is_tried_again(server, content, kind):
    # A second: what passes must not be taken for a stall where the machine is busy.
    with closing(RemoteReader(replace(FAST, timeout_seconds=1.0))) as reader:
        shard = shard_of(server)
        # A server that never sent a range does not come to it; this one's first answer is one.
        server.inject(kind, int(kind != "ignore_range"))
        assert reader.size(shard) == SIZE
        server.inject(kind, 2)
        assert reader.read(shard, 10_000, 50_000) == content[10_000:60_000]


def test_a_server_without_ranges_is_told_at_once(server, content):
    """Such as `python -m http.server`."""
    (server.root / "small.tar").write_bytes(content[:3000])
    server.inject("ignore_range", 10**6)
    with closing(RemoteReader(READING)) as reader:
        assert reader.read(shard_of(server, "small.tar"), 1000, 500) == content[1000:1500]
        with pytest.raises(DataError, match=r"shard http://127\.0\.0\.1:\d+/x\.tar: its server sends whole files only; .* range requests"):
            reader.read(shard_of(server), 10_000, 50_000)
    assert server.num_gets("x.tar") == 2


@pytest.mark.parametrize("kind", FAULTS)
def test_what_stays_is_an_error_that_names_the_shard(server, kind):
    with closing(RemoteReader(FAST)) as reader:
        shard = RemoteShard.at(f"{server.url}/x.tar?sig=SECRET", Path("sidecars"))
        reader.size(shard)
        server.inject(kind, 10**6)
        start = time.monotonic()
        with pytest.raises(DataError, match=r"shard http://127\.0\.0\.1:\d+/x\.tar") as error:
            reader.read(shard, 10_000, 50_000)
        assert time.monotonic() - start < 3
        assert "SECRET" not in str(error.value) and "\n" not in str(error.value)


def test_the_log_of_further_tries_holds_no_secret(server, content, caplog):
    with closing(RemoteReader(FAST)) as reader:
        shard = RemoteShard.at(f"{server.url}/x.tar?sig=SECRET", Path("sidecars"))
        for kind in (*BODY_FAULTS, "500", "ignore_range"):
            server.inject(kind, 1)
            reader.read(shard, random.randrange(SIZE), 1)
    assert "trying again" in caplog.text and "SECRET" not in caplog.text


def test_a_server_that_is_not_there_is_an_error(server):
    url = server.url
    server.__exit__()
    with closing(RemoteReader(FAST)) as reader, pytest.raises(UnreachableData, match=r"failed 3 times \(\w+\); check the server"):
        reader.size(RemoteShard.at(f"{url}/x.tar", Path("sidecars")))


def test_a_shard_that_is_not_there_is_an_error_at_once(server):
    with closing(RemoteReader(FAST)) as reader, pytest.raises(DataError, match=r"/gone\.tar does not exist"):
        reader.read(shard_of(server, "gone.tar"), 0, 10)
    assert server.num_gets("gone.tar") == 1


def test_a_shard_that_is_replaced_while_it_is_read_is_an_error(server, content):
    with closing(RemoteReader(FAST)) as reader:
        reader.read(shard_of(server), 0, 10)
        server.tag = "b"
        with pytest.raises(DataError, match=r"x\.tar changed since it was indexed: its tag"):
            reader.read(shard_of(server), 100_000, 10)
        server.tag = "a"
        (server.root / "x.tar").write_bytes(content[:-512])
        with pytest.raises(DataError, match=r"changed since it was indexed: 299488 bytes, before 300000"):
            reader.read(shard_of(server), 200_000, 10)


def test_distrusted_bytes_are_fetched_again(server, content):
    with closing(RemoteReader(FAST)) as reader:
        shard = shard_of(server)
        reader.read(shard, 0, 4096)
        other = bytes(4096) + content[4096:]
        (server.root / "x.tar").write_bytes(other)
        assert reader.read(shard, 0, 4096) == content[:4096]
        reader.distrust(shard, 10, 20)
        assert reader.read(shard, 0, 4096) == bytes(4096)
        server.tag = "b"
        with pytest.raises(DataError, match="changed since it was indexed"):
            reader.distrust(shard, 10, 20)


def test_closing_ends_who_waits(server):
    server.stall_seconds = 30
    reader = RemoteReader(Reading(block_bytes=4096, timeout_seconds=0.3, retries=1000))
    reader.size(shard_of(server))
    server.inject("stall", 10**6)
    errors = []

    def read() -> None:
        try:
            reader.read(shard_of(server), 0, 10_000)
        except DataError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    reader.close()
    for thread in threads:
        thread.join(5)
    assert len(errors) == 3


@pytest.mark.parametrize("kind", ["500", "reset", "stall_before_head"])
def test_a_failed_read_ahead_is_nobodys_error(server, content, kind):
    with closing(RemoteReader(READING)) as reader:
        shard = shard_of(server)
        reader.size(shard)
        server.stall_seconds = 0.05
        for offset in range(0, SIZE, 4096):
            server.inject(kind, int(offset % (4 * 4096) == 0))
            assert reader.read(shard, offset, 4096) == content[offset : offset + 4096]


def test_threads_faults_and_little_memory_change_no_byte(server, content):
    reading = Reading(block_bytes=4096, buffer_bytes=12 * 4096, read_ahead_blocks=3, timeout_seconds=0.3, retries=20)
    server.stall_seconds = 1.0
    for kind in ("500", "reset", "short", "stall", "ignore_range", "half_said", "trickle") * 5:
        server.inject(kind, 1)

    def read(seed: int) -> int:
        rng = random.Random(seed)
        for number in range(60):
            offset = number * 5000 if seed % 2 else rng.randrange(SIZE)
            size = rng.randrange(20_000)
            assert reader.read(shard, offset, size) == content[offset : offset + size]
            if rng.random() < 0.05:
                reader.distrust(shard, offset, max(1, min(size, SIZE - offset)))
        return seed

    with closing(RemoteReader(reading)) as reader, ThreadPoolExecutor(6) as pool:
        shard = shard_of(server)
        assert list(pool.map(read, range(6))) == list(range(6))
        deadline = time.monotonic() + 5
        while not all(block.future.done() for block in list(reader._blocks.values())) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reader._num_bytes == sum(block.size for block in reader._blocks.values())
    assert not any(fault.times for fault in server._faults)


def test_unknown_schemes_and_missing_packages_are_one_line(tmp_path):
    with closing(open_reader(FAST)) as reader:
        with pytest.raises(ConfigError, match="fsspec knows no such scheme"):
            reader.read(RemoteShard.at("nonsense://host/x.tar", tmp_path), 0, 1)
        with pytest.raises(ConfigError, match=r"reading gs:// shards needs .*pip install 'megamm\[remote\]'"):
            reader.read(RemoteShard.at("gs://bucket/x.tar", tmp_path), 0, 1)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, tmp_path):
    import sys

    for package, url in (("urllib3", "http://127.0.0.1/x.tar"), ("fsspec", "s3://bucket/x.tar")):
        monkeypatch.setitem(sys.modules, package, None)
        with closing(open_reader(FAST)) as reader, pytest.raises(ConfigError, match=rf"needs {package}; pip install 'megamm\[remote\]'"):
            reader.read(RemoteShard.at(url, tmp_path), 0, 1)


def test_s3_serves_the_same_bytes(tmp_path, content, monkeypatch):
    with s3_server(monkeypatch) as url:
        upload(tmp_path / "files")
        with closing(RemoteReader(READING)) as reader:
            shard = RemoteShard.at(f"{url}/x.tar", tmp_path)
            rng = random.Random(1)
            for offset, size in [(0, SIZE), (SIZE - 1, 10), *((rng.randrange(SIZE), rng.randrange(20_000)) for _ in range(30))]:
                assert reader.read(shard, offset, size) == content[offset : offset + size]
            with pytest.raises(DataError, match=r"s3://corpus/gone\.tar does not exist"):
                reader.read(RemoteShard.at(f"{url}/gone.tar", tmp_path), 0, 1)
            client().put_object(Bucket="corpus", Key="x.tar", Body=bytes(SIZE))
            with pytest.raises(DataError, match=r"s3://corpus/x\.tar changed since it was indexed"):
                reader.distrust(shard, 0, 1)
        with closing(RemoteReader(FAST)) as reader:
            reader.read(shard, 0, 1)
            client().put_object(Bucket="corpus", Key="x.tar", Body=bytes(1000))
            with pytest.raises(DataError, match=r"s3://corpus/x\.tar"):
                reader.read(shard, 100_000, 10)


def test_s3_that_never_answers_is_an_error_in_time(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        start = time.monotonic()
        with closing(RemoteReader(FAST)) as reader, pytest.raises(DataError, match=r"s3://corpus/x\.tar: .* failed 3 times \(\w*Timeout"):
            reader.read(RemoteShard.at("s3://corpus/x.tar", tmp_path), 0, 1)
        assert time.monotonic() - start < 20


def test_s3_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with closing(RemoteReader(FAST)) as reader, pytest.raises(DataError, match=r"s3://corpus/x\.tar: .* failed 3 times"):
        reader.read(RemoteShard.at("s3://corpus/x.tar", tmp_path), 0, 1)
