"""A table that names pictures, sounds, texts and labels, one sample a row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megamm.core.errors import DataError
from megamm.prepare.columns import map_option
from megamm.prepare.fields import FIELDS, MEDIA, RowLayout, row_layout
from megamm.prepare.inputs import below, existing_input, read_input, size_of
from megamm.prepare.rows import COLUMNS, Row, open_table
from megamm.prepare.source import ANSWERS, PROMPT, ROOT, TASK, Draft, Listing, Record, Source


def _records(
    *, input: Path, map: Sequence[tuple[str, str]], columns: Sequence[str], task: str, prompt: str, answers: str, root: Path | None
) -> Listing:
    """Every row is a record.

    Raises:
        ConfigError: INPUT is no table, or its columns make no sample.
        DataError: The table cannot be read.
    """
    table = open_table(existing_input(input, folder=False), columns)
    layout, notes = row_layout(map, table.columns, task=task, prompt=prompt, answers=answers, where=str(input))
    root = existing_input(root or input.parent, folder=True)
    used = tuple(layout.used)
    records = [_record(row, layout, root, used) for row in table.rows()]
    return Listing(records, partial(_make, layout=layout, root=root, used=used), notes)


def _record(row: Row, layout: RowLayout, root: Path, used: Sequence[str]) -> Record:
    """The record of a row; its data are the values of the columns in use, or the problem."""
    if row.problem:
        return layout.record({}, row.number, 0, row.problem)
    size = sum(len(value) for value in row.values.values() if isinstance(value, str))
    size += sum(_size(root, value) for field in MEDIA for value in layout.media(row.values, field))
    try:
        return layout.record(row.values, row.number, size, tuple(row.values.get(column) for column in used))
    except DataError as error:
        return layout.record({}, row.number, 0, str(error))


def _make(record: Record, *, layout: RowLayout, root: Path, used: Sequence[str]) -> Draft:
    def load(value: Any) -> tuple[bytes, str]:
        if not isinstance(value, str):
            raise DataError(f"{str(value)[:80]!r} is {type(value).__name__}, not the path of a file")
        return read_input(below(root, value)), value

    if isinstance(record.data, str):
        raise DataError(record.data)
    return layout.draft(dict(zip(used, record.data, strict=True)), load)


def _size(root: Path, value: Any) -> int:
    try:
        return size_of(below(root, value)) if isinstance(value, str) else 0
    except DataError:
        return 0


SOURCE = Source(
    name="manifest",
    help="a csv, tsv or jsonl file that names pictures, sounds, texts and labels, one sample a row",
    records=_records,
    input="the file, maybe gzipped; quotes enclose values in .csv and are plain characters in .tsv",
    options=(map_option(FIELDS), COLUMNS, TASK, PROMPT, ANSWERS, ROOT),
)
