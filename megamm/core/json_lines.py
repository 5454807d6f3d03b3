"""Files of one JSON object a line, appended while a run goes on and cut back when it resumes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamm.core.files import write_text


class JsonLines:
    """Appends objects to a file, each flushed, so that another process reads it while it grows. State: the open file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one object."""
        self._file.write(_line(value))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where it is not there; a last line that is half written is left out."""
    if not path.is_file():
        return []
    lines = []
    # Not `splitlines`: a string of an object may hold what Unicode calls a line's end.
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def last_json_lines(path: Path, num_bytes: int) -> list[dict[str, Any]]:
    """The objects in the last bytes of a file that may be growing, be it gigabytes long; lines that are not whole are left out.

    Raises:
        OSError: The file is there and cannot be read.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - num_bytes))
            texts = file.read(num_bytes).split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    # The first line began before these bytes, unless they are the whole file.
    for text in texts[1:] if end > num_bytes else texts:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return [one for one in found if isinstance(one, dict)]


def cut_back(path: Path, step: int) -> None:
    """Drop what was written past `step`, and half a line: a run that resumes there writes it again."""
    if path.is_file():
        kept = [line for line in read_json_lines(path) if line["step"] <= step]
        write_text(path, "".join(map(_line, kept)))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
