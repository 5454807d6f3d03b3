"""The sidecar index of a shard, and the strict validator that makes it.

`X.tar.index` says where every member lies, what its bytes hash to and what its media are like, so that a sample is one
positioned read and planning never opens a tar. Damage of the archive refuses the shard; trouble inside one sample (a
picture whose header is broken) is noted, and that sample is skipped with its reason, because one rotten file must not
cost the rest. What the members of a sample mean is not asked here but by `mapping`: one index serves every recipe.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import xxhash

from megamm.core.errors import DataError
from megamm.core.files import digest_file
from megamm.core.names import kind_of_message
from megamm.core.types import MediaFacts
from megamm.data.media.files import FileRange, MediaError, ReadAt, media_type
from megamm.data.media.files import read_facts as read_media_facts
from megamm.data.shards.arrays import load_arrays, read_facts, write_arrays
from megamm.data.shards.places import RemoteShard, Shard, sidecar_path
from megamm.data.shards.tar import CompressedError, TarError, TarMember, scan

INDEX_VERSION = 3
_MEDIA_CODES = {"image": 1, "audio": 2}
_MEDIA_NAMES = {code: name for name, code in _MEDIA_CODES.items()}
# WebDataset's own rule: the key ends at the first dot of the file's name, the rest is the member's suffix.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)\Z")
_RESERVED = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: suffix such as `0.jpg`, where its bytes lie, and the xxh3-64 of its header and them.

    The header is part of it because it holds the name: equal bytes under other keys are other samples.
    """

    suffix: str
    offset: int
    size: int
    digest: int


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard. Legend: N samples, M members; all arrays may be views of the mapped sidecar.

    Attributes:
        tar_size: Bytes of the tar.
        digest: xxh3-128 of the tar, 32 hexadecimal digits.
        suffixes: The distinct member suffixes that `member_suffixes` indexes.
        problems: Sample number -> why it cannot be used.
        key_offsets: int64[N + 1] into `key_bytes`.
        key_bytes: uint8, the keys in UTF-8.
        key_digests: uint64[N], xxh3-64 of each key.
        member_starts: int64[N + 1], where the members of each sample start.
        member_offsets: int64[M], first byte inside the tar.
        member_sizes: int64[M] in bytes.
        member_digests: uint64[M], xxh3-64 of the header block and the bytes.
        member_suffixes: uint32[M].
        media_types: uint8[M], 0 where there are no media facts.
        media_sizes: int64[M, 2], width and height in pixels, or samples and hertz.
    """

    tar_size: int
    digest: str
    suffixes: tuple[str, ...]
    problems: dict[int, str]
    key_offsets: np.ndarray
    key_bytes: np.ndarray
    key_digests: np.ndarray
    member_starts: np.ndarray
    member_offsets: np.ndarray
    member_sizes: np.ndarray
    member_digests: np.ndarray
    member_suffixes: np.ndarray
    media_types: np.ndarray
    media_sizes: np.ndarray

    @property
    def num_samples(self) -> int:
        """Samples of the shard."""
        return len(self.key_digests)

    def key(self, sample: int) -> str:
        """Key of a sample."""
        return self.key_bytes[self.key_offsets[sample] : self.key_offsets[sample + 1]].tobytes().decode()

    def members(self, sample: int) -> list[Member]:
        """The files of a sample in the order of the tar."""
        span = slice(int(self.member_starts[sample]), int(self.member_starts[sample + 1]))
        columns = (self.member_suffixes, self.member_offsets, self.member_sizes, self.member_digests)
        rows = zip(*(column[span].tolist() for column in columns), strict=True)
        return [Member(self.suffixes[suffix], offset, size, digest) for suffix, offset, size, digest in rows]

    def media(self, sample: int) -> dict[str, MediaFacts]:
        """Member suffix -> facts, for the pictures and sounds whose headers could be read."""
        facts = {}
        for member in range(int(self.member_starts[sample]), int(self.member_starts[sample + 1])):
            if code := int(self.media_types[member]):
                first, second = self.media_sizes[member].tolist()
                type_ = _MEDIA_NAMES[code]
                suffix = self.suffixes[self.member_suffixes[member]]
                facts[suffix] = MediaFacts("image", first, second) if type_ == "image" else MediaFacts("audio", 0, 0, first, second)
        return facts


_ARRAYS = tuple(name for name, kind in ShardIndex.__annotations__.items() if kind == "np.ndarray")


def index_path(tar: Shard) -> Path:
    """Where the index of `tar` lies."""
    return sidecar_path(tar, ".index")


def build_index(tar: Path) -> ShardIndex:
    """Read a shard once, check all of it, and return its index.

    Raises:
        DataError: The shard is missing, is not a whole tar of regular files, a key's members are not adjacent, or a key or
            a member occurs twice; the message names shard and key.
    """
    try:
        # Opening a pipe would wait for its writer.
        if tar.exists() and not tar.is_file():
            raise DataError(f"shard {tar} is no file; name a tar archive")
        with tar.open("rb") as file:
            descriptor = file.fileno()
            return build_index_from(tar, lambda offset, size: os.pread(descriptor, size, offset), os.fstat(descriptor).st_size)
    except FileNotFoundError:
        raise DataError(f"shard {tar} does not exist; check the path") from None


def build_index_from(shard: Shard, read: ReadAt, size: int) -> ShardIndex:
    """`build_index` of `size` bytes that come from anywhere, read once and in order (media headers a second time).

    Raises:
        DataError: As `build_index`.
    """
    try:
        return _build(read, size)
    except CompressedError as error:
        raise DataError(f"shard {shard}: {error}") from None
    except TarError as error:
        raise DataError(f"shard {shard}: {error}; write it again") from None


def write_index(tar: Shard, index: ShardIndex | None = None) -> ShardIndex:
    """Write the sidecar of `tar` atomically, building the index unless it is given (a remote one must be); returns it.

    Raises:
        DataError: As `build_index`.
    """
    if index is None:
        assert isinstance(tar, Path), "the index of a remote shard is built over a reader"
        index = build_index(tar)
    facts = {
        "version": INDEX_VERSION,
        "num_samples": index.num_samples,
        "tar_size": index.tar_size,
        "digest": index.digest,
        "suffixes": list(index.suffixes),
        "problems": {str(sample): reason for sample, reason in index.problems.items()},
    }
    write_arrays(index_path(tar), {name: getattr(index, name) for name in _ARRAYS}, facts)
    return index


def problem_kinds(shard: Shard, index: ShardIndex, problems: Mapping[int, str]) -> Counter[str]:
    """Counts samples that cannot be used, by reasons without the names and numbers in them.

    Args:
        shard: Where the samples lie.
        index: Of the shard.
        problems: Sample number -> reason, as an index or planned lengths hold it.
    """
    return Counter(kind_of_message(reason, index.key(number), shard.name) for number, reason in problems.items())


def load_index(tar: Shard, verify_digest: bool = False) -> ShardIndex:
    """Map the index of a shard, after checking that the shard still has the size that was indexed.

    Args:
        tar: The shard.
        verify_digest: Also read the whole shard and compare its digest (local shards; `sidecars.verify` reads remote ones).

    Raises:
        DataError: Shard or index is missing, the index is damaged or of another version, or the shard changed.
    """
    check_unchanged(tar, read_shard_facts(tar))
    file = load_arrays(index_path(tar), subject=f"shard {tar}", fix=_fix(tar))
    facts = file.facts
    if verify_digest:
        assert isinstance(tar, Path), "remote shards are verified over a reader"
        if (found := digest_file(tar)) != facts["digest"]:
            raise DataError(f"shard {tar} changed since it was indexed: digest {found}, indexed {facts['digest']}; {_fix(tar)}")
    return ShardIndex(
        tar_size=facts["tar_size"],
        digest=facts["digest"],
        suffixes=tuple(facts["suffixes"]),
        problems={int(sample): reason for sample, reason in facts["problems"].items()},
        **{name: file.arrays[name] for name in _ARRAYS},
    )


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """The few facts that opening a dataset needs of each shard, read from the index's header alone."""

    num_samples: int
    tar_size: int
    digest: str


def read_shard_facts(tar: Shard) -> ShardFacts:
    """Read the header of a shard's index.

    Raises:
        DataError: The index is missing, damaged or of another version.
    """
    path = index_path(tar)
    try:
        facts, _ = read_facts(path)
        if facts["version"] != INDEX_VERSION:
            raise DataError(f"shard {tar}: its index has version {facts['version']}, this is {INDEX_VERSION}; {_fix(tar)}")
        return ShardFacts(int(facts["num_samples"]), int(facts["tar_size"]), str(facts["digest"]))
    except FileNotFoundError:
        if isinstance(tar, Path) and not tar.exists():
            raise DataError(f"shard {tar} does not exist; check data.root and the dataset's shards") from None
        raise DataError(f"shard {tar}: {path.name} is missing; {_fix(tar)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"shard {tar}: {path.name} is damaged ({error}); delete it and {_fix(tar)}") from None


def check_unchanged(tar: Shard, facts: ShardFacts) -> None:
    """Compare the shard's size with the indexed one; of a remote shard `RemoteReader` does it when it is first read.

    Raises:
        DataError: The shard is missing or has another size.
    """
    if isinstance(tar, RemoteShard):
        return
    try:
        size = tar.stat().st_size
    except FileNotFoundError:
        raise DataError(f"shard {tar} does not exist, but its index does; bring it back or delete {index_path(tar).name}") from None
    if size != facts.tar_size:
        raise DataError(f"shard {tar} changed since it was indexed: {size} bytes, indexed {facts.tar_size}; {_fix(tar)}")


def _fix(tar: Shard) -> str:
    return f"run `megamm data index {tar}`"


@dataclass
class _Columns:
    """The columns of an index while it grows."""

    keys: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    suffixes: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    facts: list[tuple[int, int]] = field(default_factory=list)
    suffix_numbers: dict[str, int] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)


def _build(read: ReadAt, tar_size: int) -> ShardIndex:
    columns, digest = _Columns(), xxhash.xxh3_128()
    seen: set[str] = set()
    key, suffixes = None, set[str]()
    for member, stream in scan(read, tar_size, digest.update):
        new_key, suffix = _split(member.name)
        if new_key != key:
            if key is not None:
                columns.starts.append(len(columns.offsets))
            if new_key in seen:
                raise TarError(f"key {new_key!r} occurs twice, or its members are not adjacent")
            seen.add(new_key)
            key, suffixes = new_key, set()
            columns.keys.append(key)
        # WebDataset's readers take suffixes in lower case, where `a.JPG` and `a.jpg` would be one member.
        if suffix.lower() in suffixes:
            raise TarError(f"member {member.name!r} occurs twice")
        suffixes.add(suffix.lower())
        _add_member(columns, member, suffix, stream(), read)
    if key is not None:
        columns.starts.append(len(columns.offsets))
    return _finished(columns, tar_size, digest.hexdigest())


def _split(name: str) -> tuple[str, str]:
    match = _NAME.match(name)
    if match is None or _RESERVED.match(name) or match.group(2).startswith("_"):
        raise TarError(f"member name {name!r} is not KEY.SUFFIX as WebDataset reads it")
    return match.group(1), match.group(2)


def _add_member(columns: _Columns, member: TarMember, suffix: str, stream: Iterable[bytes], read: ReadAt) -> None:
    digest = xxhash.xxh3_64(member.header)
    for block in stream:
        digest.update(block)
    columns.offsets.append(member.offset)
    columns.sizes.append(member.size)
    columns.digests.append(digest.intdigest())
    columns.suffixes.append(columns.suffix_numbers.setdefault(suffix, len(columns.suffix_numbers)))
    code, facts = 0, (0, 0)
    try:
        if type_ := media_type(suffix):
            file = io.BufferedReader(FileRange(read, member.offset, member.size))
            found = read_media_facts(type_, cast(BinaryIO, file))
            code, facts = _MEDIA_CODES[type_], (found.width, found.height) if type_ == "image" else (found.num_frames, found.rate_hz)
    except MediaError as error:
        columns.problems.setdefault(len(columns.keys) - 1, f"{suffix}: {error}")
    columns.types.append(code)
    columns.facts.append(facts)


def _finished(columns: _Columns, tar_size: int, digest: str) -> ShardIndex:
    encoded = [key.encode() for key in columns.keys]
    return ShardIndex(
        tar_size=tar_size,
        digest=digest,
        suffixes=tuple(columns.suffix_numbers),
        problems=columns.problems,
        key_offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        key_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        key_digests=np.array([xxhash.xxh3_64_intdigest(key) for key in encoded], dtype=np.uint64),
        member_starts=np.array(columns.starts, dtype=np.int64),
        member_offsets=np.array(columns.offsets, dtype=np.int64),
        member_sizes=np.array(columns.sizes, dtype=np.int64),
        member_digests=np.array(columns.digests, dtype=np.uint64),
        member_suffixes=np.array(columns.suffixes, dtype=np.uint32),
        media_types=np.array(columns.types, dtype=np.uint8),
        media_sizes=np.array(columns.facts, dtype=np.int64).reshape(-1, 2),
    )
