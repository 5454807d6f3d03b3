"""Tables as rows: csv, tsv and jsonl, also gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from megamm.core.errors import ConfigError, DataError
from megamm.core.names import listed
from megamm.prepare.source import Option

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_ROW_ENDINGS = (*_DELIMITERS, ".jsonl")
_ROWS_TO_KNOW = 1000

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its line number in the file, counted from 1, its values by column, and why it cannot be used (empty where it can)."""

    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """A file of rows, read again whenever they are asked for.

    Attributes:
        path: The file.
        columns: In the order in which they occur; of jsonl those of the first lines.
        read: Yields the rows.
    """

    path: Path
    columns: tuple[str, ...]
    read: Callable[[], Iterator[Row]]

    def rows(self) -> Iterator[Row]:
        """The rows; one that cannot be read comes with its problem.

        Raises:
            DataError: The file is damaged.
            OSError: It cannot be read.
        """
        return _whole(self.path, self.read())


def names(text: str) -> tuple[str, ...]:
    """A list of names with commas between them, as an option's word."""
    found = listed(text)
    if not found:
        raise ValueError(f"{text!r} names nothing; write names with commas between them")
    return found


COLUMNS = Option("columns", "names of the columns of a csv or tsv file without a header line", names, (), "A,B,…")


def open_table(path: Path, columns: Sequence[str] = ()) -> Table:
    """Look at the columns of a table.

    In `.tsv` files quotes are characters like others; in `.csv` files they enclose values.

    Args:
        path: A `.csv`, `.tsv` or `.jsonl` file, maybe with `.gz` behind.
        columns: Names of the columns of a file without a header line.

    Raises:
        ConfigError: Another kind of file, or no column at all.
        DataError: The file is damaged.
        OSError: It cannot be read.
    """
    kind = row_ending(path)
    if kind == ".jsonl":
        if columns:
            raise ConfigError(f"{path} names its columns in every line; leave --columns out")
        table = Table(path, (), partial(_json_rows, path))
        first = islice(table.rows(), _ROWS_TO_KNOW)
        return replace(table, columns=tuple(dict.fromkeys(name for row in first for name in row.values)))
    header = tuple(columns) or next((tuple(fields) for _, fields in _whole(path, _csv_lines(path, kind))), ())
    if not header or len(set(header)) < len(header):
        raise ConfigError(f"{path} has the columns {list(header)}; name each once, in a header line or with --columns")
    return Table(path, header, partial(_csv_rows, path, kind, header, has_header=not columns))


def row_ending(path: Path) -> str:
    """`.csv`, `.tsv`, `.txt` (as tsv) or `.jsonl`, without `.gz`.

    Raises:
        ConfigError: Another ending.
    """
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if ending.lower() not in _ROW_ENDINGS:
        raise ConfigError(f"{path} ends in {ending or 'nothing'}; name a .csv, .tsv or .jsonl file (.gz may follow)")
    return ending.lower()


def open_text(path: Path) -> IO[str]:
    """Open a UTF-8 file, unpacking `.gz`; bytes that are not UTF-8 become lone surrogates, which `is_text` finds."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def is_text(value: str) -> bool:
    """Whether a string is whole Unicode, without halves of surrogate pairs or bytes that were not UTF-8."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _whole(path: Path, values: Iterator[Value]) -> Iterator[Value]:
    try:
        yield from values
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}); fetch it again") from None


def _csv_lines(path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of each row that holds something, the header's as well."""
    with open_text(path) as file:
        reader = csv.reader(file, delimiter=_DELIMITERS[kind], quoting=csv.QUOTE_MINIMAL if kind == ".csv" else csv.QUOTE_NONE)
        try:
            yield from ((reader.line_num, fields) for fields in reader if fields)
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: {error}; correct the file or write it as jsonl") from None


def _csv_rows(path: Path, kind: str, header: Sequence[str], *, has_header: bool) -> Iterator[Row]:
    for number, fields in islice(_csv_lines(path, kind), has_header, None):
        if len(fields) != len(header):
            yield Row(number, {}, f"line {number} has {len(fields)} values for {len(header)} columns")
        elif not all(map(is_text, fields)):
            yield Row(number, {}, f"line {number} is not UTF-8")
        else:
            yield Row(number, dict(zip(header, fields, strict=True)))


def _json_rows(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if not is_text(line):
                yield Row(number, {}, f"line {number} is not UTF-8")
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(number, {}, f"line {number} is not JSON ({error})")
                continue
            if isinstance(value, dict):
                yield Row(number, value)
            else:
                yield Row(number, {}, f"line {number} is {type(value).__name__}, not a JSON object")
