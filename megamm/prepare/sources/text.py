"""Plain text to continue: documents of text files or of jsonl lines, cut into chunks without overlap."""

from __future__ import annotations

import json
import mmap
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError, DataError
from megamm.prepare.chunks import chunks, first_chunk
from megamm.prepare.columns import Columns, map_option, need, resolve
from megamm.prepare.fields import as_text
from megamm.prepare.inputs import existing_input, walk
from megamm.prepare.names import plain_key, stems
from megamm.prepare.rows import is_text
from megamm.prepare.source import TASK, Draft, Listing, Option, Record, Source, count, one_of

_FIELDS = {
    "text": "the document",
    "key": "name of the document",
    "split": "part of the data that it belongs to, such as train or test",
    "group": "what must stay on one side of --test-share (default: the document)",
    "metadata": "kept beside each chunk under the column's name",
}
_PLAIN, _LINES = (".txt", ".md"), (".jsonl",)
_LINES_TO_KNOW = 1000
_MODES = ("file", "line", "blank-line")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chunk lies.

    Attributes:
        file: Number of its file.
        document: Number of its document in the file: its line in jsonl, else counted from 0.
        offset: First byte of the document.
        length: Bytes of the document.
        begin: Where the chunk begins in the document, in bytes of a text file, in characters of a jsonl text.
        end: Where it ends.
        number: Of the chunk in its document.
    """

    file: int
    document: int
    offset: int
    length: int
    begin: int
    end: int
    number: int


_WIDTH = 7


@dataclass(eq=False)
class _Chunks(Sequence[Record]):
    """All chunks as numbers, a few bytes each, so that a corpus fits into memory by its places; records are made when asked for.

    Attributes:
        has_whole_files: Whether a text file is one document.
        files: Paths below the input.
        places: `_WIDTH` numbers a chunk, as `_Place`.
        names: Key, split and group of the documents that say them, by file and document.
        problems: Why a document cannot be used, by file and document; it has one place.
    """

    has_whole_files: bool
    files: list[str] = field(default_factory=list)
    places: array[int] = field(default_factory=lambda: array("q"))
    names: dict[tuple[int, int], tuple[str, str, str]] = field(default_factory=dict)
    problems: dict[tuple[int, int], str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places) // _WIDTH

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = _Place(*self.places[index * _WIDTH : (index + 1) * _WIDTH])
        which = place.file, place.document
        own, split, group = self.names.get(which, ("", "", ""))
        file = self.files[place.file]
        is_whole = self.has_whole_files and not file.endswith(_LINES)
        document = own or (self._stems[place.file] if is_whole else f"{self._stems[place.file]}-{place.document:08}")
        data = (place, file, self.problems.get(which, ""))
        key = f"{plain_key(document)}-{place.number:05}"
        return Record(key, place.end - place.begin, data, split, group or own or (file if is_whole else document))

    @cached_property
    def _stems(self) -> list[str]:
        return stems(self.files)


def _records(*, input: Path, map: Sequence[tuple[str, str]], task: str, documents: str, chunk_characters: int) -> Listing:
    """Every chunk is a record.

    Raises:
        ConfigError: INPUT holds no text, or lines have no column with it.
    """
    folder = input if existing_input(input).is_dir() else input.parent
    found = _Chunks(has_whole_files=documents == "file")
    columns: dict[str, Columns] = {}
    others = Counter[str]()
    for path in walk(input) if input.is_dir() else [input]:
        name = path.relative_to(folder).as_posix()
        if path.suffix not in (*_PLAIN, *_LINES) or not is_text(name):
            others[path.suffix or "no ending"] += 1
            continue
        found.files.append(name)
        if path.suffix in _LINES:
            columns[name] = _list_lines(path, found, map, chunk_characters)
        else:
            _list_plain(path, found, documents, chunk_characters)
    if not found.files:
        raise ConfigError(f"{input} holds no {', '.join((*_PLAIN, *_LINES))} file; unpack compressed files, chunks are read by position")
    notes = [f"{count} files of ending {ending} are not used" for ending, count in sorted(others.items())]
    return Listing(found, partial(_make, folder=folder, columns=columns, task=task or "text"), notes)


def _list_plain(path: Path, found: _Chunks, mode: str, max_characters: int) -> None:
    file = len(found.files) - 1
    if path.stat().st_size == 0:
        return
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for document, (offset, length) in enumerate(_documents(content, mode)):
            places = array("q")
            try:
                for number, (begin, end) in enumerate(_byte_chunks(content, offset, length, max_characters)):
                    places.extend((file, document, offset, length, begin, end, number))
            except UnicodeDecodeError as error:
                found.problems[file, document] = f"{path.name} is not UTF-8 at byte {error.start}"
                places = array("q", (file, document, offset, length, 0, length, 0))
            found.places.extend(places)


def _documents(content: mmap.mmap, mode: str) -> Iterator[tuple[int, int]]:
    """Offset and length of each document that holds something, in bytes."""
    if mode == "file":
        yield 0, len(content)
        return
    start = end = 0
    while end < len(content):
        line_start, end = end, (content.find(b"\n", end) + 1) or len(content)
        is_blank = not content[line_start:end].strip()
        if mode == "line":
            if not is_blank:
                yield line_start, end - line_start
        elif is_blank:
            if content[start:line_start].strip():
                yield start, line_start - start
            start = end
    if mode == "blank-line" and content[start:].strip():
        yield start, len(content) - start


def _byte_chunks(content: mmap.mmap, offset: int, length: int, max_characters: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk inside a document, in bytes; only a chunk at a time is decoded.

    Raises:
        UnicodeDecodeError: The document is not UTF-8; `start` counts from the beginning of the file.
    """
    begin = 0
    while begin < length:
        # A character takes up to four bytes; one more shows whether the text goes on.
        window = content[offset + begin : offset + min(length, begin + 4 * (max_characters + 1))]
        try:
            text = window.decode()
        except UnicodeDecodeError as error:
            text = window[: error.start].decode()
            # What is wrong behind this chunk is the window's own end, or is met again by a later chunk.
            if len(text) <= max_characters:
                raise UnicodeDecodeError("utf-8", b"", offset + begin + error.start, offset + begin + error.end, error.reason) from None
        end = begin + len(text[: first_chunk(text[: max_characters + 1], max_characters)].encode())
        yield begin, end
        begin = end


def _list_lines(path: Path, found: _Chunks, map: Sequence[tuple[str, str]], max_characters: int) -> Columns:
    file, offset, columns = len(found.files) - 1, 0, _resolve(path, map)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    text, names = _read_fields(_json_line(line), columns)
                    if any(names):
                        found.names[file, number] = names
                    for chunk, (begin, end) in enumerate(chunks(text, max_characters)):
                        found.places.extend((file, number, offset, len(line), begin, end, chunk))
            except DataError as error:
                found.problems[file, number] = f"{path.name} line {number}: {error}"
                found.places.extend((file, number, offset, len(line), 0, len(line), 0))
            offset += len(line)
    return columns


def _resolve(path: Path, map: Sequence[tuple[str, str]]) -> Columns:
    """The columns of the first lines, which must hold what is mapped."""
    existing: dict[str, None] = {}
    with path.open("rb") as lines:
        for line in islice(lines, _LINES_TO_KNOW):
            with suppress(DataError):
                existing |= dict.fromkeys(_json_line(line))
    columns = resolve(map, list(existing), _FIELDS, repeated=("metadata",), where=str(path))
    need(columns, "text", list(existing), str(path))
    if reserved := sorted({"task", "messages", "chunk", "file"} & set(columns.get("metadata", ()))):
        raise ConfigError(f"the column {reserved[0]} cannot be kept as metadata, samples have a field of that name; rename it")
    return columns


def _json_line(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON in UTF-8 ({error})") from None
    if not isinstance(document, dict):
        raise DataError(f"it is {type(document).__name__}, not a JSON object")
    return document


def _read_fields(document: dict[str, Any], columns: Columns) -> tuple[str, tuple[str, str, str]]:
    text = as_text(document.get(columns["text"][0]))
    if not text.strip():
        raise DataError(f"its {columns['text'][0]} is empty")
    names = [as_text(document.get(columns[name][0])) if name in columns else "" for name in ("key", "split", "group")]
    if not all(map(is_text, (text, *names))):
        raise DataError("it holds half of a surrogate pair")
    return text, (names[0], names[1], names[2])


def _make(record: Record, *, folder: Path, columns: dict[str, Columns], task: str) -> Draft:
    place, name, problem = record.data
    if problem:
        raise DataError(problem)
    with (folder / name).open("rb") as file:
        file.seek(place.offset if name in columns else place.offset + place.begin)
        content = file.read(place.length if name in columns else place.end - place.begin)
    metadata: dict[str, Any] = {"file": name, "chunk": place.number}
    if name in columns:
        document = _json_line(content)
        text = _read_fields(document, columns[name])[0][place.begin : place.end]
        metadata |= {column: document.get(column) for column in columns[name].get("metadata", ())}
    else:
        text = content.decode()
    message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return Draft({**metadata, "task": task, "messages": [message]})


SOURCE = Source(
    name="text",
    help="documents of text files or jsonl lines to continue, cut into chunks without overlap",
    records=_records,
    input="a .txt, .md or .jsonl file, or a folder of them",
    options=(
        map_option(_FIELDS),
        TASK,
        Option(
            "documents",
            "what a document is in text files: file (default), line or blank-line (what lies between them)",
            one_of(*_MODES),
            "file",
            "WHAT",
        ),
        Option("chunk_characters", "longest chunk; cut at paragraphs, lines, sentences or spaces (default 4000)", count, 4000, "N"),
    ),
)
