"""Files of one JSON object a line, appended while a run goes on and cut back when it resumes."""

from __future__ import annotations

import json
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
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_back(path: Path, step: int) -> None:
    """Drop what was written past `step`, and half a line: a run that resumes there writes it again."""
    if path.is_file():
        kept = [line for line in read_json_lines(path) if line["step"] <= step]
        write_text(path, "".join(map(_line, kept)))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
