"""Which column of a table is which field of a sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megamm.core.errors import ConfigError
from megamm.prepare.source import Option

Columns = Mapping[str, tuple[str, ...]]
"""Field -> the columns that fill it, in order."""


def pair(text: str) -> tuple[str, str]:
    """`COLUMN=FIELD`, as an option's word."""
    column, equals, field = text.rpartition("=")
    if not (column and equals and field):
        raise ValueError(f"{text!r} is not COLUMN=FIELD, such as file_name=image")
    return column, field


def map_option(fields: Mapping[str, str]) -> Option:
    """The `--map` of a source.

    Args:
        fields: Field -> one line of help.
    """
    listed = "; ".join(f"{name}: {what}" for name, what in fields.items())
    text = f"fill FIELD from COLUMN; may be given often. A column named like a field fills it without this. Fields: {listed}"
    return Option("map", text, pair, (), "COLUMN=FIELD", is_repeated=True)


def resolve(
    pairs: Sequence[tuple[str, str]],
    columns: Sequence[str],
    fields: Collection[str],
    *,
    repeated: Collection[str] = (),
    where: str,
) -> dict[str, tuple[str, ...]]:
    """Join what the user mapped with the columns that are named like a field.

    Args:
        pairs: Column and field, as given.
        columns: Columns that exist.
        fields: Fields that the source has.
        repeated: Fields that several columns may fill.
        where: The file, for the error.

    Raises:
        ConfigError: A column or a field does not exist, or a field is filled twice.
    """
    found: dict[str, list[str]] = {}
    for column, field in pairs:
        if column not in columns:
            raise ConfigError(f"--map {column}={field}: {where} has no column {column!r}; its columns are {_listed(columns)}")
        if field not in fields:
            raise ConfigError(f"--map {column}={field}: there is no field {field!r}; the fields are {_listed(fields)}")
        found.setdefault(field, []).append(column)
    for column in columns:
        if column in fields and column not in found and column not in [one for one, _ in pairs]:
            found[column] = [column]
    for field, filling in found.items():
        if len(filling) > 1 and field not in repeated:
            raise ConfigError(f"--map fills the field {field!r} from {_listed(filling)}; name one column")
    return {field: tuple(filling) for field, filling in found.items()}


def need(columns: Columns, field: str, existing: Sequence[str], where: str) -> str:
    """The one column of a field that must be filled.

    Raises:
        ConfigError: No column fills it.
    """
    if field not in columns:
        raise ConfigError(f"no column of {where} is the {field}; give --map COLUMN={field}, its columns are {_listed(existing)}")
    return columns[field][0]


def _listed(values: Collection[str]) -> str:
    shown = list(values)[:40]
    return ", ".join(shown) + (", …" if len(values) > len(shown) else "") if shown else "none"
