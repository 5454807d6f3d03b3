"""Recipes as files, for tests that go through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_recipe(path: Path, table: dict[str, Any]) -> Path:
    """Write a recipe as TOML. JSON's strings, numbers, lists and booleans are TOML as well; None is left out."""
    path.write_text("\n".join(f"{key} = {_value(item)}" for key, item in table.items() if item is not None) + "\n")
    return path


def _value(item: Any) -> str:
    if isinstance(item, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(one)}" for key, one in item.items() if one is not None) + "}"
    return json.dumps(item)
