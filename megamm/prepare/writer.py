"""Writes one shard: whole, checked, indexed, and the same bytes every time."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megamm.core.errors import DataError
from megamm.core.files import canonical_json, sync_folder
from megamm.data.media.files import DEFAULT_LIMITS, media_type, read_facts
from megamm.data.shards.index import build_index, index_path, write_index
from megamm.prepare.names import MAX_NAME, is_key
from megamm.prepare.source import Draft
from megamm.tasks.template import parse_sample


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard: file name without its ending, samples, bytes, xxh3-128 of the bytes (32 hexadecimal digits)."""

    name: str
    num_samples: int
    num_bytes: int
    digest: str


def sample_files(key: str, draft: Draft) -> dict[str, bytes]:
    """The files of a sample by suffix, after checking that every reader accepts them.

    Args:
        key: Unique in the shard.
        draft: The sample.

    Raises:
        DataError: The key, the document or the members are not what a reader accepts.
    """
    where = f"sample {key!r}"
    if not is_key(key):
        raise DataError(f"{where}: a key holds letters, digits, '_', '-' and '/' only; make one with names.plain_key")
    files = {"json": _json_bytes(draft.document, where), **draft.members}
    sample = parse_sample(key, draft.document, where=where)
    named = {part.member for message in sample.messages for part in message.content if part.member}
    if named != draft.members.keys():
        raise DataError(f"{where}: the messages name {sorted(named)} and the members are {sorted(draft.members)}; give exactly those")
    for suffix, content in files.items():
        if len(f"{key}.{suffix}") > MAX_NAME:
            raise DataError(f"{where}: the name {key}.{suffix} has more than {MAX_NAME} characters; shorten the key")
        if not isinstance(content, bytes) or not content:
            raise DataError(f"{where}: member {suffix} is {type(content).__name__} of no bytes; give encoded bytes")
        if type_ := media_type(suffix):
            read_facts(type_, io.BytesIO(content))
    return files


class ShardFile:
    """One shard while it is written, under a temporary name; a context manager.

    When the block ends the shard is synced, indexed and renamed, the index first, so that a shard under its own name is whole and has
    its index. When it ends by an error, or without a sample, nothing stays. Equal samples give equal bytes. Nothing is pickled: members are
    bytes that the caller encoded.

    Attributes:
        shard: The finished shard, after the block; None where no sample was added.
    """

    def __init__(self, path: Path) -> None:
        """Start a shard.

        Args:
            path: Where it will stand; its folder exists. A shard that is there is replaced.
        """
        import webdataset  # brings torch along, which nothing else here needs

        self.shard: Shard | None = None
        self._path = path
        self._temporary = temporary_path(path)
        self._num_samples = 0
        self._file = self._temporary.open("wb")
        # Owner, time and mode are fixed, so that the same samples are the same bytes on every machine.
        self._tar = webdataset.TarWriter(self._file, user="root", group="root", mode=0o644, mtime=0, encoder=False, compress=False)

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """Append a sample that `sample_files` made."""
        self._tar.write({"__key__": key, **files})
        self._num_samples += 1

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and self._num_samples:
                self._publish()
            else:
                self._name(error)
                with suppress(OSError):  # else the tar would try to end itself when it is collected
                    self._tar.close()
        except OSError as failure:
            self._name(failure)
            raise
        finally:
            with suppress(OSError):  # what is to stay was synced; flushing the rest is what a full disk refuses
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _name(self, error: BaseException | None) -> None:
        """A full disk says so without saying where."""
        if isinstance(error, OSError):
            error.filename = error.filename or str(self._path)

    def _publish(self) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        index = build_index(self._temporary)
        if index.problems:
            raise DataError(f"shard {self._path}: its index finds samples that cannot be used: {index.problems}; this is a bug, report it")
        write_index(self._path, index)
        try:
            self._temporary.rename(self._path)
        except BaseException:
            index_path(self._path).unlink(missing_ok=True)
            raise
        sync_folder(self._path.parent)
        self.shard = Shard(self._path.name.removesuffix(".tar"), index.num_samples, index.tar_size, index.digest)


def temporary_path(path: Path) -> Path:
    """Where this process writes `path` before it has its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path, names: Collection[str]) -> None:
    """Remove what killed processes left of some shards and their indexes."""
    for path in folder.glob(".*.tmp"):
        if path.name[1:].partition(".")[0] in names:
            path.unlink(missing_ok=True)


def _json_bytes(document: Mapping[str, Any], where: str) -> bytes:
    try:
        content = canonical_json(document).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the document is not JSON ({error}); give strings, finite numbers, lists and objects") from None
    if len(content) > (limit := DEFAULT_LIMITS.text_bytes):
        raise DataError(f"{where}: the document takes {len(content)} bytes, readers take {limit}; cut it into several samples")
    return content
