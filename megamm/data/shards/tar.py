"""A strict reader of tar headers: what cannot be trusted is refused, where usual readers stop early or guess.

Takes ustar, GNU (long names, large sizes) and PAX archives of regular files, and steps over the entries of folders that the
tar command writes. Nothing else in a shard has a use, and links, devices, sparse files or paths outside the sample would be
ways to smuggle something in.

Source: POSIX.1-2008 "pax Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megamm.data.media.files import ReadAt

BLOCK_BYTES = 512
_RECORD_BYTES = 20 * BLOCK_BYTES
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_CHUNK_BYTES = 1 << 20
_GZIP_SIGNATURE = b"\x1f\x8b"
_MAX_EXTENSION_BYTES = 1 << 20
_PAX_TAKEN = frozenset({"path", "size"})
_PAX_HARMLESS = re.compile(r"([amc]time|[ug]id|[ug]name|comment|SCHILY\.(dev|ino|nlink|fflags|acl\..+|xattr\..+)|LIBARCHIVE\..+)\Z")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class TarError(ValueError):
    """The archive is damaged or holds something that a shard must not hold."""


class CompressedError(TarError):
    """The archive is compressed as a whole."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """One regular file: its name, where its bytes lie, and the block before them."""

    name: str
    offset: int
    size: int
    header: bytes


def scan(read: ReadAt, size: int, feed: Callable[[bytes], None]) -> Iterator[tuple[TarMember, Callable[[], Iterator[bytes]]]]:
    """Walk over all members of an archive, reading every byte of it once and in order.

    Args:
        read: Reads the file.
        size: Its size in bytes.
        feed: Receives every byte of the file, in order (a digest's `update`).

    Yields:
        A member and a function that streams its bytes; what is not streamed before the next member is skipped over (but fed).

    Raises:
        TarError: Anything that is not a whole archive of regular files with safe names.
    """
    walker = _Walker(read, size, feed)
    while (member := walker.next_member()) is not None:
        yield member, walker.stream
        walker.finish()
    walker.check_end()


class _Walker:
    """Position in the archive; `stream` may be called at most once a member."""

    def __init__(self, read: ReadAt, size: int, feed: Callable[[bytes], None]) -> None:
        if read(0, min(size, len(_GZIP_SIGNATURE))) == _GZIP_SIGNATURE:
            raise CompressedError("it is compressed with gzip; decompress it, shards are read from any place")
        if size % BLOCK_BYTES:
            raise TarError(f"{size} bytes are not a multiple of {BLOCK_BYTES}: the archive is cut")
        self._read_at, self._size, self._feed = read, size, feed
        self._position = 0
        self._end = 0

    def next_member(self) -> TarMember | None:
        name: str | None = None
        num_bytes: int | None = None
        extended = False
        while (header := self._header()) is not None:
            kind = header[156:157]
            size = _number(header[124:136], "size", self._position)
            if kind in (b"0", b"\0"):
                name = _header_name(header) if name is None else name
                size = size if num_bytes is None else num_bytes
                self._enter(size)
                return TarMember(_safe_name(name), self._position, size, header)
            if kind == b"L":
                name = _text(self._extension(size).rstrip(b"\0"))
            elif kind == b"x":
                records = _pax_records(self._extension(size))
                name = records.get("path", name)
                num_bytes = _decimal(records["size"]) if "size" in records else num_bytes
            elif kind == b"g":
                if taken := _PAX_TAKEN & _pax_records(self._extension(size)).keys():
                    raise TarError(f"a global header sets {sorted(taken)} of every member")
                continue
            elif kind == b"5" and not size:
                name, num_bytes, extended = None, None, False
                continue
            else:
                what = _KINDS.get(kind, f"of type {kind!r}")
                raise TarError(f"{_header_name(header)!r} is {what}; a shard holds regular files only")
            extended = True
        if extended:
            raise TarError("the archive ends after an extended header without its member")
        return None

    def stream(self) -> Iterator[bytes]:
        """The bytes of the current member in blocks."""
        while self._position < self._end:
            yield self._read(min(_CHUNK_BYTES, self._end - self._position))

    def finish(self) -> None:
        """Step over what is left of the current member and its padding."""
        for _ in self.stream():
            pass
        if padding := -self._position % BLOCK_BYTES:
            self._read(padding)

    def check_end(self) -> None:
        """Two zero blocks, and nothing but the zeros that fill a record after them."""
        if self._size - self._position < BLOCK_BYTES:
            raise TarError("the archive ends with one zero block of two: it is cut")
        num_zeros = BLOCK_BYTES + self._size - self._position
        while self._position < self._size:
            if self._read(min(_CHUNK_BYTES, self._size - self._position)).strip(b"\0"):
                raise TarError("bytes follow the end of the archive")
        # A hole over the last members looks like a long end; no writer leaves one.
        fills_record = self._size % _RECORD_BYTES == 0 and num_zeros < 2 * BLOCK_BYTES + _RECORD_BYTES
        if num_zeros > 2 * BLOCK_BYTES and not fills_record:
            raise TarError(f"{num_zeros} zeros follow the last member, more than any writer leaves: members are missing")

    def _header(self) -> bytes | None:
        if self._position + BLOCK_BYTES > self._size:
            raise TarError("the archive has no end mark: it is cut")
        start = self._position
        header = self._read(BLOCK_BYTES)
        if header == _ZERO_BLOCK:
            return None
        stated = _number(header[148:156], "checksum", start)
        if sum(header) - sum(header[148:156]) + 8 * 32 != stated:
            raise TarError(f"the header at byte {start} does not match its checksum")
        if header[257:263] not in (b"ustar\0", b"ustar "):
            raise TarError(f"the header at byte {start} is neither ustar nor GNU")
        return header

    def _enter(self, size: int) -> None:
        if self._position + size > self._size:
            raise TarError(f"a member of {size} bytes at byte {self._position} reaches beyond the file: the archive is cut")
        self._end = self._position + size

    def _extension(self, size: int) -> bytes:
        if size > _MAX_EXTENSION_BYTES:
            raise TarError(f"an extended header of {size} bytes (limit {_MAX_EXTENSION_BYTES})")
        self._enter(size)
        content = b"".join(self.stream())
        self.finish()
        return content

    def _read(self, size: int) -> bytes:
        content = self._read_at(self._position, size)
        if len(content) < size:
            raise TarError("the file became shorter while it was read")
        self._feed(content)
        self._position += size
        return content


def _number(field: bytes, what: str, position: int) -> int:
    """An octal field, or GNU's base-256 form for what octal cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]+", digits):
        raise TarError(f"the {what} of the header at byte {position} is not a number")
    return int(digits, 8)


def _decimal(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise TarError(f"the size {text!r} of an extended header is not a number")
    return int(text)


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise TarError(f"the name {raw!r} is not UTF-8") from None


def _header_name(header: bytes) -> str:
    name = _text(header[0:100].partition(b"\0")[0])
    # GNU headers keep times where POSIX ones keep the first part of a long name.
    prefix = _text(header[345:500].partition(b"\0")[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _safe_name(name: str) -> str:
    # The tar command writes `./` before the names of `tar -c .`; it leads nowhere.
    parts = name.removeprefix("./").split("/")
    if "\\" in name or any(part in ("", ".", "..") for part in parts) or any(ord(character) < 32 for character in name):
        raise TarError(f"the member name {name!r} is not a plain relative path")
    return name


def _pax_records(content: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of an extended header; keys that change a member's meaning are refused."""
    records: dict[str, str] = {}
    while content:
        match = re.match(rb"([1-9][0-9]{0,7}) ([^=\n]+)=", content)
        length = int(match.group(1)) if match else 0
        if match is None or length > len(content) or length <= match.end() or content[length - 1 : length] != b"\n":
            raise TarError("an extended header is malformed")
        key = _text(match.group(2))
        if key in _PAX_TAKEN:
            records[key] = _text(content[match.end() : length - 1])
        elif not _PAX_HARMLESS.match(key):
            raise TarError(f"an extended header sets {key!r}, which a shard must not")
        content = content[length:]
    return records
