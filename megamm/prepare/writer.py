"""Writes WebDataset shards that are whole, checked and the same bytes every time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megamm.core.errors import DataError
from megamm.core.files import canonical_json, sync_folder
from megamm.core.types import MEDIA_TYPES, Sample
from megamm.data.index import write_index
from megamm.tasks.template import parse_sample

# A tar header holds names of up to 100 bytes; longer or other ones would need extension headers, which carry no fixed bytes.
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_MAX_NAME = 100


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard."""

    path: Path
    num_samples: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.num_samples} samples, {self.num_bytes / 1e6:.1f} MB"


class ShardWriter:
    """Writes samples into `PREFIX-00000.tar`, `PREFIX-00001.tar`, … with an index beside each.

    A context manager. Shards are written under temporary names. When the block ends they are synced, renamed and indexed; when it ends
    by an error they are removed, because half of a data set looks like a whole one. Equal samples give equal bytes. Nothing is
    pickled: members are bytes that the caller encoded.

    Attributes:
        shards: The finished shards, after the block.
    """

    def __init__(self, folder: Path, prefix: str, *, max_bytes: int = 1 << 30, max_samples: int = 10_000) -> None:
        """Open a set of shards.

        Args:
            folder: Where the shards go; made if it is not there.
            prefix: Their name before the number.
            max_bytes: Payload bytes after which a shard is closed; a larger sample gets a shard of its own.
            max_samples: Samples after which a shard is closed.

        Raises:
            DataError: `folder` already holds shards of this prefix.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if existing := sorted(folder.glob(f"{prefix}-*.tar*")):
            raise DataError(
                f"{folder} already holds {existing[0].name}; name another folder, or remove its {prefix}-*.tar* to write them anew"
            )
        self.shards: list[Shard] = []
        self._folder = folder
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._max_samples = max_samples
        self._keys: set[str] = set()
        self._parts: list[_Part] = []

    def write(self, key: str, document: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
        """Add a sample.

        Args:
            key: Unique in this set of shards; letters, digits, `_`, `-`, with `/` between folders.
            document: Content of `KEY.json`.
            members: Member suffix, such as `0.png`, to its bytes: exactly those that the document names.

        Raises:
            DataError: The key, the document or the members are not what a reader accepts.
        """
        where = f"{self._prefix} sample {key!r}"
        if not _KEY.fullmatch(key) or key in self._keys:
            reason = "was written before" if key in self._keys else "holds other characters than letters, digits, '_', '-' and '/'"
            raise DataError(f"{where}: the key {reason}; give every sample its own plain key")
        files = {"json": _json_bytes(document, where), **members}
        named = _members_named(parse_sample(key, document, where=where))
        if named != members.keys():
            raise DataError(f"{where}: the messages name {sorted(named)} and the members are {sorted(members)}; give exactly those")
        for suffix, content in files.items():
            if len(f"{key}.{suffix}") > _MAX_NAME:
                raise DataError(f"{where}: the name {key}.{suffix} has more than {_MAX_NAME} characters; shorten the key")
            if not isinstance(content, bytes) or not content:
                raise DataError(f"{where}: member {suffix} is {type(content).__name__} of no bytes; give encoded bytes")
        self._part_for(sum(map(len, files.values()))).add(key, files)
        self._keys.add(key)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for part in self._parts:
                part.close()
            if error is None:
                self._publish()
        finally:
            for part in self._parts:
                part.path.unlink(missing_ok=True)

    def _part_for(self, num_bytes: int) -> _Part:
        """The open part, or the next one where `num_bytes` more do not fit."""
        if self._parts:
            last = self._parts[-1]
            if last.num_samples < self._max_samples and last.num_bytes + num_bytes <= self._max_bytes:
                return last
            last.close()
        self._parts.append(_Part(self._folder / f".{self._prefix}-{len(self._parts):05}.{os.getpid()}.tmp"))
        return self._parts[-1]

    def _publish(self) -> None:
        if not self._parts:
            raise DataError(f"no sample was written to {self._folder / self._prefix}-*.tar; look at the source")
        for number, part in enumerate(self._parts):
            path = self._folder / f"{self._prefix}-{number:05}.tar"
            part.path.rename(path)
            self.shards.append(Shard(path, part.num_samples, path.stat().st_size))
        sync_folder(self._folder)
        for shard in self.shards:
            write_index(shard.path)


class _Part:
    """A shard while it is written, under its temporary name."""

    def __init__(self, path: Path) -> None:
        import webdataset  # brings torch along, which nothing else here needs

        self.path = path
        self.num_samples = 0
        self.num_bytes = 0
        self._file = path.open("wb")
        # Owner, time and mode are fixed, so that the same samples are the same bytes on every machine.
        self._tar = webdataset.TarWriter(self._file, user="root", group="root", mode=0o644, mtime=0, encoder=False, compress=False)

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        self.num_bytes += self._tar.write({"__key__": key, **files})
        self.num_samples += 1

    def close(self) -> None:
        if not self._file.closed:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _json_bytes(document: Mapping[str, Any], where: str) -> bytes:
    try:
        return canonical_json(document).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the document is not JSON ({error}); give strings, finite numbers, lists and objects") from None


def _members_named(sample: Sample) -> set[str]:
    return {part.member for message in sample.messages for part in message.content if part.type in MEDIA_TYPES}
