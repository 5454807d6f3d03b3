"""The cache gives back what was put, or nothing; within its bound, whatever other processes do or how they die."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import Reading
from megamm.data.shards.cache import BlockCache
from megamm.data.shards.places import RemoteShard, sidecar_path
from megamm.data.shards.remote import RemoteReader
from tests.support.http_server import FileServer

BLOCK = 1000


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.block"))


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_what_was_put_comes_back(tmp_path):
    cache = BlockCache(tmp_path, 1 << 20)
    assert cache.get("a") is None
    cache.put("a", b"one")
    cache.put("empty", b"")
    assert cache.get("a") == b"one" and cache.get("empty") == b"" and BlockCache(tmp_path, 1 << 20).get("a") == b"one"
    cache.drop("a")
    cache.drop("a")
    assert cache.get("a") is None


@given(st.data())
def test_no_damage_is_given_back(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    cache = BlockCache(folder, 1 << 20)
    cache.put("a", content_of(0))
    (path,) = blocks(folder)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path.write_bytes(raw)
    assert cache.get("a") is None and not path.exists()
    cache.put("a", content_of(0))
    assert cache.get("a") == content_of(0)


def test_a_block_under_another_name_is_damage(tmp_path):
    cache = BlockCache(tmp_path, 1 << 20)
    cache.put("a", content_of(0))
    (of_a,) = blocks(tmp_path)
    cache.put("b", content_of(1))
    (of_b,) = set(blocks(tmp_path)) - {of_a}
    of_b.write_bytes(of_a.read_bytes())
    assert cache.get("b") is None


def test_the_oldest_used_blocks_make_room(tmp_path):
    limit = 20 * (BLOCK + 16)
    cache = BlockCache(tmp_path, limit)
    for number in range(100):
        cache.put(str(number), content_of(number))
        assert stored_bytes(tmp_path) <= limit
        assert cache.get("0") == content_of(0)
        time.sleep(0.001)
    kept = [number for number in range(100) if cache.get(str(number)) is not None]
    assert len(kept) >= 17 and kept[1:] == list(range(101 - len(kept), 100))
    cache.put("too large", bytes(limit))
    assert cache.get("too large") is None


def _hammer(folder: Path, seed: int, limit: int, seconds: float) -> None:
    cache, rng = BlockCache(folder, limit), random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = rng.randrange(60)
        content = cache.get(str(number))
        if content is None:
            cache.put(str(number), content_of(number))
        elif content != content_of(number):
            os._exit(3)


def test_a_block_that_goes_while_room_is_made_is_no_broken_disk(tmp_path, monkeypatch, caplog):
    cache = BlockCache(tmp_path, 5 * (BLOCK + 16))
    for number in range(5):
        cache.put(str(number), content_of(number))
    listed = os.scandir

    def then_dropped(path):
        # Another process finds a block damaged and drops it, which takes no lock.
        entries = list(listed(path))
        for entry in entries:
            if entry.name.endswith(".block"):
                Path(entry.path).unlink()
        return entries

    monkeypatch.setattr("megamm.data.shards.cache.os.scandir", then_dropped)
    cache.put("new", content_of(9))
    assert cache.get("new") == content_of(9) and not caplog.records


def test_many_processes_and_deaths_leave_a_whole_cache(tmp_path):
    limit = 30 * (BLOCK + 16)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_hammer, args=(tmp_path, seed, limit, seconds)) for seed, seconds in enumerate((60.0, 60.0, 3.0, 3.0))
    ]
    for process in processes:
        process.start()
    observer = BlockCache(tmp_path, limit)
    most, rng, end = 0, random.Random(0), time.monotonic() + 30
    while any(process.is_alive() for process in processes[2:]) and time.monotonic() < end:
        for process in processes[:2]:
            if process.is_alive() and blocks(tmp_path) and rng.random() < 0.02:
                os.kill(process.pid, signal.SIGKILL)
        # While nobody writes: a count of files that come and go is no size that the folder ever had.
        with observer._locked() as count:
            most = max(most, stored_bytes(tmp_path) if count is not None else 0)
        time.sleep(0.005)
    for process in processes[:2]:
        process.kill()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    assert limit / 2 < most <= limit
    for number in range(60):
        assert observer.get(str(number)) in (None, content_of(number))


def _die_while_writing(folder: Path) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    cache = BlockCache(folder, 10 * (BLOCK + 16))
    Path.replace = die  # type: ignore[method-assign]
    cache.put("a", content_of(0))


def test_a_writer_that_dies_between_write_and_rename_leaves_nothing_to_read(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_die_while_writing, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".tmp"]
    cache = BlockCache(tmp_path, 10 * (BLOCK + 16))
    assert cache.get("a") is None
    for number in range(20):
        cache.put(str(number), content_of(number))
    assert cache.get("19") == content_of(19) and not list(tmp_path.glob("*/*.tmp"))
    assert stored_bytes(tmp_path) <= 10 * (BLOCK + 16)


def _fill_a_full_disk(folder: Path, url: str, content: bytes, results) -> None:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megamm").addHandler(handler)
    # The count of used bytes still fits, a block does not: EFBIG where a full disk says ENOSPC.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    reading = Reading(block_bytes=4096, read_ahead_blocks=0, buffer_bytes=4096, cache_folder=str(folder), timeout_seconds=5.0)
    with closing(RemoteReader(reading)) as reader:
        shard = RemoteShard.at(f"{url}/x.tar", folder.parent / "sidecars")
        same = all(reader.read(shard, offset, 4096) == content[offset : offset + 4096] for offset in range(0, len(content), 4096))
    results.put((same, [line for line in lines if "cache" in line]))


@pytest.fixture
def indexed(tmp_path) -> tuple[bytes, Path]:
    """A shard of one sample under `files`, and its index where a remote reader of it finds it."""
    from megamm.data.shards.index import write_index
    from tests.support.shards import as_files, text_document, write_tar

    tar = write_tar(tmp_path / "files/x.tar", {"a": as_files(text_document("plain words " * 4000))})
    write_index(tar)
    return tar.read_bytes(), tar


def place_index(url: str, tar: Path, sidecars: Path) -> RemoteShard:
    shard = RemoteShard.at(f"{url}/x.tar", sidecars)
    shard.folder.mkdir(parents=True)
    sidecar_path(shard, ".index").write_bytes(sidecar_path(tar, ".index").read_bytes())
    return shard


def test_a_full_disk_is_told_once_and_reading_goes_on(tmp_path, indexed):
    content, tar = indexed
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with FileServer(tmp_path / "files") as server:
        place_index(server.url, tar, tmp_path / "sidecars")
        process = context.Process(target=_fill_a_full_disk, args=(tmp_path / "cache", server.url, content, results))
        process.start()
        same, lines = results.get(timeout=60)
        process.join(30)
    assert same and len(lines) == 1 and "File too large" in lines[0]
    assert not blocks(tmp_path / "cache") and not list((tmp_path / "cache").glob("*/*.tmp"))


def test_a_second_reader_fetches_nothing(tmp_path, indexed):
    content, tar = indexed
    reading = Reading(block_bytes=4096, buffer_bytes=4096, cache_folder=str(tmp_path / "cache"), timeout_seconds=5.0)
    with FileServer(tmp_path / "files") as server:
        shard = place_index(server.url, tar, tmp_path / "sidecars")
        for num_gets in (1 + -(-len(content) // 4096), 1):
            server.requests.clear()
            with closing(RemoteReader(reading)) as reader:
                assert reader.read(shard, 0, len(content)) == content
            assert server.num_gets("x.tar") == num_gets
        path = blocks(tmp_path / "cache")[0]
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        server.requests.clear()
        with closing(RemoteReader(reading)) as reader:
            assert reader.read(shard, 0, len(content)) == content
        assert server.num_gets("x.tar") == 2
