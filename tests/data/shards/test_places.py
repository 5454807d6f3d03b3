"""What a recipe may call its shards, and where their sidecars go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.errors import ConfigError
from megamm.data.shards.places import RemoteShard, expand, has_magic, rooted, sidecar_path

SIDE = Path("sidecars")


def test_ranges_are_webdatasets():
    from webdataset.shardlists import expand_urls

    for pattern in ("https://host/x-{00000..00011}.tar", "s3://b/{train,val}-{0..2}.tar", "a/x-{08..11}.tar", "https://host/x.tar?a=1"):
        assert list(expand(pattern)) == expand_urls(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat /etc/passwd", "'pipe:' is never run or read"),
        ("exec:rm x.tar", "is never run"),
        ("file:///data/x.tar", "by their path"),
        ("simplecache::s3://bucket/x.tar", "chained"),
        ("https://user:secret@host/x.tar", "must not hold a name or a password"),
        ("s3://key:secret@bucket/x.tar", "must not hold a name or a password"),
        ("https://host", "names no file"),
        ("https://host/folder/", "names no file"),
        ("s3:///x.tar", "names no file"),
        ("https://host/x-*.tar", "lists no files"),
        ("https://[::1/x.tar", "is no URL"),
        ("zip://x.tar::https://host/x.zip", "chained"),
        ("x-{00..11.tar", "no partner"),
        ("x-{00}.tar", "no range"),
        ("x-{0..99999999}.tar", "more than"),
    ],
)
def test_what_shards_cannot_be_read_from_is_refused_in_one_line(pattern, message, monkeypatch):
    monkeypatch.setattr("megamm.data.shards.places.MAX_SHARDS", 1000)
    with pytest.raises(ConfigError, match=message) as error:
        list(expand(pattern))
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["https://host/x.tar?sig=a::b", "http://[::1]:8000/x.tar", "HTTP://host/x.tar?x=[1]*"])
def test_queries_and_addresses_of_web_servers_are_no_globs(url):
    assert list(expand(url)) == [url] and not has_magic(url)
    assert has_magic("s3://bucket/x-?[01]*.tar") and has_magic("x-?.tar")


def test_a_shard_shows_no_query():
    shard = RemoteShard.at("https://host/data/x-00.tar?sig=SECRET", SIDE)
    assert str(shard) == "https://host/data/x-00.tar" and shard.name == "x-00.tar"
    assert shard.beside(".index") == "https://host/data/x-00.tar.index?sig=SECRET"
    assert "SECRET" not in str(sidecar_path(shard, ".index"))


PLACES = st.tuples(
    st.sampled_from(["https", "http", "s3"]), st.sampled_from(["a", "b.c", "b-c"]), st.sampled_from(["", "p/", "p/q/", "p-q/"]),
    st.sampled_from(["", "?v=1", "?v=2"]),
)  # fmt: skip


@given(PLACES, PLACES)
def test_equal_names_of_different_places_never_meet(one, other):
    paths = [
        sidecar_path(RemoteShard.at(f"{scheme}://{host}/{folder}x-0.tar{query}", SIDE), ".index")
        for scheme, host, folder, query in (one, other)
    ]
    assert (paths[0] == paths[1]) == (one == other)
    assert all(path.name == "x-0.tar.index" and path.parent.parent == SIDE for path in paths)


def test_neighbours_share_a_folder_and_sort_by_name():
    shards = [RemoteShard.at(url, SIDE) for url in sorted(expand("s3://b/p/x-{00..12}.tar"))]
    assert len({shard.folder for shard in shards}) == 1 and shards == sorted(shards)


def test_sidecars_of_local_shards_lie_beside_them():
    assert sidecar_path(Path("a/x.tar"), ".index") == Path("a/x.tar.index")
    assert rooted("x-*.tar", Path("root")) == "root/x-*.tar" and rooted("s3://b/x.tar", Path("root")) == "s3://b/x.tar"
