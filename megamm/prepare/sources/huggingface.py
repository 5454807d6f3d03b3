"""A data set that the library `datasets` saved with `save_to_disk`: a folder of rows, or a folder of splits of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError, DataError
from megamm.prepare.columns import map_option
from megamm.prepare.fields import FIELDS, RowLayout, row_layout
from megamm.prepare.inputs import below, existing_input, read_input
from megamm.prepare.source import ANSWERS, PROMPT, ROOT, TASK, Draft, Listing, Record, Source


def _records(*, input: Path, map: Sequence[tuple[str, str]], task: str, prompt: str, answers: str, root: Path | None) -> Listing:
    """Every row is a record. Media are taken as they were stored, classes by their names.

    Raises:
        ConfigError: `datasets` is not installed, INPUT is no such folder, or its columns make no sample.
    """
    rows_of = _open(str(existing_input(input, folder=True)))
    layouts: dict[str, RowLayout] = {}
    records: list[Record] = []
    notes: dict[str, None] = {}
    for split, rows in rows_of.items():
        layouts[split], unused = row_layout(
            map, rows.column_names, task=task, prompt=prompt, answers=answers, where=f"{input} {split}".strip()
        )
        notes.update(dict.fromkeys(unused))
        records += _list_split(split, rows, layouts[split])
    make = partial(_make, input=input, root=existing_input(root or input, folder=True), layouts=layouts)
    return Listing(records, make, list(notes))


def _list_split(split: str, rows: Any, layout: RowLayout) -> list[Record]:
    size = rows.data.nbytes // max(1, len(rows))
    named = sorted({layout.columns[field][0] for field in ("key", "split", "group") if field in layout.columns})
    columns = rows.select_columns(named)[:].to_pydict() if named else {}
    names = _class_names(rows.features)
    records = []
    for number in range(len(rows)):
        values = _with_class_names({name: column[number] for name, column in columns.items()}, names)
        try:
            record = layout.record(values, number, size, (split, number, ""))
        except DataError as error:
            record = layout.record({}, number, 0, (split, number, str(error)))
        # Every split counts its rows from 0.
        key = record.key if "key" in layout.columns or not split else f"{split}/{record.key}"
        records.append(Record(key, record.num_bytes, record.data, record.split or split, record.group))
    return records


def _make(record: Record, *, input: Path, root: Path, layouts: Mapping[str, RowLayout]) -> Draft:
    split, number, problem = record.data
    if problem:
        raise DataError(problem)
    rows, layout = _open(str(input))[split], layouts[split]
    values = _with_class_names(rows.select_columns(layout.used)[number].to_pylist()[0], _class_names(rows.features))

    def load(value: Any) -> tuple[bytes, str]:
        fields = value if isinstance(value, dict) else {"bytes" if isinstance(value, bytes) else "path": value}
        content, path = fields.get("bytes"), fields.get("path")
        if isinstance(content, bytes) and content:
            return content, path or "the medium"
        if isinstance(path, str) and path:
            return read_input(below(root, path)), path
        raise DataError(f"{str(value)[:80]!r} is neither stored bytes nor the path of a file")

    return layout.draft(values, load)


@lru_cache(maxsize=4)
def _open(folder: str) -> dict[str, Any]:
    """Split -> its rows, memory-mapped; the empty name where there are no splits. A process opens a folder once."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError("the source huggingface needs datasets; install it with `pip install 'megamm[prepare]'`") from None
    try:
        found = datasets.load_from_disk(folder)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is no folder of `datasets.Dataset.save_to_disk` ({' '.join(str(error).split())[:200]})") from None
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}
    # Rows come as Arrow holds them, so that no medium is decoded.
    return {str(split): rows.with_format("arrow") for split, rows in splits.items()}


def _class_names(features: Mapping[str, Any]) -> dict[str, Callable[[int], Any]]:
    """Column -> number of a class to its name, for columns of classes or of lists of classes."""
    from datasets import ClassLabel

    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: feature.int2str for name, feature in inner.items() if isinstance(feature, ClassLabel)}


def _with_class_names(values: Mapping[str, Any], names: Mapping[str, Callable[[int], str]]) -> dict[str, Any]:
    def named(column: str, value: Any) -> Any:
        if isinstance(value, list):
            return [named(column, one) for one in value]
        # Data sets without labels, such as public test sets, hold -1.
        return None if value is None or value < 0 else names[column](value)

    return {column: named(column, value) if column in names else value for column, value in values.items()}


SOURCE = Source(
    name="huggingface",
    help="a local data set of the library `datasets`, saved with save_to_disk; its splits stay apart",
    records=_records,
    input="the folder",
    options=(map_option(FIELDS), TASK, PROMPT, ANSWERS, ROOT),
)
