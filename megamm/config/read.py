"""The strict reader: TOML recipe, dotted overrides, one line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli
from pydantic import TypeAdapter, ValidationError

from megamm.config.schema import Recipe
from megamm.core.errors import ConfigError
from megamm.core.files import read_json
from megamm.core.names import did_you_mean

_ADAPTER = TypeAdapter(Recipe)
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("megamm.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path, and apply `--dotted.key value` overrides.

    Raises:
        ConfigError: No such recipe, not TOML, an unknown key or a value of the wrong type.
    """
    path = Path(name)
    if name.endswith(".toml") or path.is_file():
        if not path.is_file():
            raise ConfigError(f"recipe {name} does not exist; give a TOML file or one of: {', '.join(recipe_names())}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"recipe {name} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    elif name in recipe_names():
        text = resources.files("megamm.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"recipe {name!r} is not known{did_you_mean(name, recipe_names())}; the recipes are: {', '.join(recipe_names())}")
    try:
        table = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name} is not valid TOML: {error}") from error
    return from_dict(apply_overrides(table, overrides))


def load_resolved(path: Path) -> Recipe:
    """Read the `config.json` that a run archived.

    Raises:
        ConfigError: The file is missing or was not written by this version's schema.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; name a run folder that `megamm pretrain` wrote")
    return from_dict(read_json(path))


def resumed_recipe(archived: Path, recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """What a run goes on with: its archived recipe with this command's overrides, once a checkpoint was committed.

    Args:
        archived: The run's `config.json`; it need not exist.
        recipe: What the command names, overrides applied; taken where there is nothing to go on with.
        overrides: Of this command.

    Raises:
        ConfigError: The run is of a recipe of another name, or the archive cannot be read.
    """
    if not archived.is_file() or not any((archived.parent / "checkpoints").glob("step_*")):
        return recipe
    table = read_json(archived)
    if table.get("name") != recipe.name:
        raise ConfigError(f"{archived.parent} holds a run of {table.get('name')!r}, not of {recipe.name!r}; name another folder with --run")
    return from_dict(apply_overrides(table, overrides))


def from_dict(table: dict[str, Any]) -> Recipe:
    """Validate a nested table.

    Raises:
        ConfigError: The first mistake, with its dotted key, its value and the fix.
    """
    try:
        # Through JSON, because strict mode takes a TOML list for a tuple only there.
        return _ADAPTER.validate_json(json.dumps(table), strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(error, table)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the recipe holds a value that is not plain TOML: {error}") from error


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values; `from_dict` gives it back equal."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))  # type: ignore[call-overload]


def apply_overrides(table: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Set `--a.b value` (or `--a.b=value`) in a copy of `table`; values are read as TOML, else as strings.

    Raises:
        ConfigError: An argument is not of that form, or a key leads through something that is not a table.
    """
    result = json.loads(json.dumps(table))
    for key, text in _pairs(arguments):
        *parents, last = key.split(".")
        place = result
        for depth, name in enumerate(parents):
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--{key}: {'.'.join(parents[: depth + 1])} is a value, not a table; override it itself")
        place[last] = _value(text, wants_text=_is_text(key))
    return result


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"{word!r} is not an override; write --dotted.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            text = rest.pop(0)
        yield key, text


def _value(text: str, *, wants_text: bool) -> Any:
    if wants_text:
        return text
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def _is_text(key: str) -> bool:
    """True where the schema wants a string: a folder named `1e5` must not become a number."""
    kind: Any = Recipe
    for name in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return False
        kind = _strip_none(kind)
    return kind is str


def _strip_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        return kinds[0] if len(kinds) == 1 else kind
    return kind


def _one_line(error: ValidationError, table: dict[str, Any]) -> str:
    # A key that is misspelt is both unknown and missing: the unknown one says what to correct.
    first = min(error.errors(include_url=False), key=lambda one: one["type"] not in _UNKNOWN)
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] in _UNKNOWN:
        known = _fields_at(place[:-1])
        return f"{key} is not a key of a recipe{did_you_mean(place[-1], known)}; {_scope(place[:-1])} has: {', '.join(known)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} is missing; set it{_named_beside(place, table)}"
    more = f" (and {error.error_count() - 1} more mistakes)" if error.error_count() > 1 else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}={json.dumps(first['input'], default=str)} is not valid: {message}{more}"


def _named_beside(place: list[str], table: dict[str, Any]) -> str:
    """`; did you mean 'NAME'?` where an entry that lacks a key (a dataset, say) is named nearly as another is."""
    for name in place[:-2]:
        table = table.get(name, {})
    return "" if len(place) < 3 or _fields_at(place[:-2]) else did_you_mean(place[-2], table.keys() - {place[-2]})


def _scope(place: list[str]) -> str:
    return ".".join(place) if place else "the recipe"


def _fields_at(place: list[str]) -> list[str]:
    kind: Any = Recipe
    for name in place:
        if dataclasses.is_dataclass(kind):
            kind = _strip_none(typing.get_type_hints(kind).get(name))
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
