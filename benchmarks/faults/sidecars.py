"""Damage of what lies beside a shard: index and planned lengths that are torn, flipped, stale, swapped or gone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import document, flipped, healthy, pack
from benchmarks.faults.truth import RULES, load_tokenizer, train_tokenizer
from megamm.core.errors import MegaMMError
from megamm.data.samples import catalogue, lengths
from megamm.data.samples.lengths import ensure_lengths, lengths_key, lengths_path
from megamm.data.shards.index import index_path, write_index


def index_cuts(canary: Path) -> Iterator[Case]:
    """Every length of the index below its own."""
    for size in range(len(_sidecars()["index"])):
        yield _case(f"{size} bytes stay", lambda tar, size=size: _change(index_path(tar), lambda content: content[:size]))


def index_bits(canary: Path) -> Iterator[Case]:
    """Every fifth bit of the index, so that every byte is hit."""
    for bit in range(0, len(_sidecars()["index"]) * 8, 5):
        yield _case(f"bit {bit}", lambda tar, bit=bit: _change(index_path(tar), lambda content: flipped(content, bit)))


def index_swaps(canary: Path) -> Iterator[Case]:
    """Indexes of other shards (of the same size, too), of an earlier version of the shard, without the shard, and none at all."""
    for name, other in _others().items():
        yield _case(f"index of a shard with {name}", lambda tar, other=other: _put(tar, other, "index"))
        yield _case(f"index and lengths of a shard with {name}", lambda tar, other=other: _put(tar, other, "index", "lengths"))
        yield _case(f"the shard was written anew with {name}", lambda tar: None, found=other)
    yield _case("the index is gone", lambda tar: index_path(tar).unlink())
    yield _case("the index is a folder", lambda tar: _as_folder(index_path(tar)))
    yield _case("the index leads to itself", lambda tar: _as_loop(index_path(tar)))
    yield _case("the shard is gone", Path.unlink)
    yield _case("the shard is a folder", _as_folder)
    yield _case("lengths in place of the index", lambda tar: index_path(tar).write_bytes(_sidecars()["lengths"]))


def lengths_cuts(canary: Path) -> Iterator[Case]:
    """Every length of the planned lengths below their own."""
    for size in range(len(_sidecars()["lengths"])):
        yield _case(f"{size} bytes stay", lambda tar, size=size: _change(_lengths(tar), lambda content: content[:size]), passes=True)


def lengths_bits(canary: Path) -> Iterator[Case]:
    """Every fifth bit of the planned lengths, so that every byte is hit."""
    for bit in range(0, len(_sidecars()["lengths"]) * 8, 5):
        yield _case(f"bit {bit}", lambda tar, bit=bit: _change(_lengths(tar), lambda content: flipped(content, bit)), passes=True)


def lengths_swaps(canary: Path) -> Iterator[Case]:
    """Planned lengths of other shards, of another tokenizer, or none at all."""
    for name, other in _others().items():
        yield _case(f"lengths of a shard with {name}", lambda tar, other=other: _put(tar, other, "lengths"), passes=True)
    yield _case("lengths of another tokenizer", _lengths_of_other_tokenizer, passes=True)
    yield _case("the lengths are gone", lambda tar: _lengths(tar).unlink(), passes=True)
    yield _case("the lengths are a folder", lambda tar: _as_folder(_lengths(tar)), passes=True)
    yield _case("index in place of the lengths", lambda tar: _lengths(tar).write_bytes(_sidecars()["index"]), passes=True)


def joined_lengths(canary: Path) -> Iterator[Case]:
    """Every third bit and cuts of the file that very large datasets map, which is made here for a small one."""
    with _as_if_large("IN_MEMORY_SAMPLES", 0):
        size = 128 + len(healthy()) * 3 * 4
        for bit in range(0, size * 8, 3):
            yield _case(f"bit {bit}", _joined_first(lambda tar, bit=bit: _change(_joined(tar), lambda content: flipped(content, bit))))
        for kept in range(0, size, 8):
            yield _case(f"{kept} bytes stay", _joined_first(lambda tar, kept=kept: _change(_joined(tar), lambda content: content[:kept])))


def catalogues(canary: Path) -> Iterator[Case]:
    """Damage of the catalogue of many shards, made here for one, and everything that befalls the sidecars behind its back."""
    with _as_if_large("MIN_SHARDS", 1):
        for case in (*index_swaps(canary), *lengths_swaps(canary)):
            yield replace(case, spoil=_joined_first(case.spoil or (lambda tar: None)), passes=True)
        for bit in range(0, 4400, 61):
            yield _case(
                f"bit {bit}", _joined_first(lambda tar, bit=bit: _change(_catalogue(tar), lambda body: flipped(body, bit))), passes=True
            )
        for kept in range(0, 550, 61):
            yield _case(
                f"{kept} bytes stay", _joined_first(lambda tar, kept=kept: _change(_catalogue(tar), lambda body: body[:kept])), passes=True
            )


@contextmanager
def _as_if_large(name: str, value: int) -> Iterator[None]:
    """Let a dataset of one small shard be treated as a large one."""
    before = {module: getattr(module, name) for module in (lengths, catalogue) if hasattr(module, name)}
    try:
        for module in before:
            setattr(module, name, value)
        yield
    finally:
        for module, old in before.items():
            setattr(module, name, old)


def _joined_first(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    """`spoil`, once all files of a large dataset are there."""

    def run(tar: Path) -> None:
        ensure_lengths([tar], load_tokenizer(), RULES)
        spoil(tar)

    return run


def _case(name: str, spoil: Callable[[Path], object], *, found: bytes | None = None, passes: bool = False) -> Case:
    return Case(name, pack(healthy()), healthy(), found=found, spoil=spoil, passes=passes)


def _others() -> dict[str, bytes]:
    """Shards that another index could belong to."""
    samples = healthy()
    renamed = {key[::-1]: files for key, files in samples.items()}
    turned = dict(reversed(samples.items()))
    reworded = {key: {name: body.replace(b"answer", b"ANSWER") for name, body in files.items()} for key, files in samples.items()}
    return {
        "other keys": pack(renamed),
        "another order": pack(turned),
        "other answers": pack(reworded),
        "fewer samples": pack({"t0": samples["t0"]}),
        "more samples": pack({**samples, "t2": {"json": document("one more")}}),
    }


@lru_cache(maxsize=8)
def _sidecars(content: bytes | None = None) -> dict[str, bytes]:
    """The sidecars that a shard gets."""
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "train-00000.tar"
        tar.write_bytes(pack(healthy()) if content is None else content)
        write_index(tar)
        ensure_lengths([tar], load_tokenizer(), RULES)
        return {"index": index_path(tar).read_bytes(), "lengths": _lengths(tar).read_bytes()}


def _lengths(tar: Path) -> Path:
    return lengths_path(tar, lengths_key(load_tokenizer(), RULES))


def _joined(tar: Path) -> Path:
    return next(tar.parent.glob("lengths-*.npy"))


def _catalogue(tar: Path) -> Path:
    return next(path for path in tar.parent.iterdir() if ".catalogue-" in path.name)


def _put(tar: Path, other: bytes, *names: str) -> None:
    places = {"index": index_path(tar), "lengths": _lengths(tar)}
    for name in names:
        places[name].write_bytes(_sidecars(other)[name])


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _lengths_of_other_tokenizer(tar: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = train_tokenizer(Path(folder), ["completely different words"], text_size=290)
        try:
            ensure_lengths([tar], other, RULES)
        except MegaMMError as error:
            raise AssertionError("the other lengths could not be made") from error
        lengths_path(tar, lengths_key(other, RULES)).replace(_lengths(tar))
