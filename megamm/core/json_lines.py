"""Files of one JSON object a line, appended while a run goes on and cut back when it resumes."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from megamm.core.files import write_text
from megamm.core.logging import get_logger

_log = get_logger("core")


class JsonLines:
    """Appends objects to a file, each at once, so that another process reads it while it grows; it is there from the first object on.

    No run should end for a line of a log: what a full or failing disk refuses is told once, kept, and written with a later object.

    State: the open file, and what was refused.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: FileIO | None = None
        self._waiting: deque[bytes] = deque()
        self._is_refused = False

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one object."""
        self._waiting.append(_line(value).encode())
        self._append()

    def close(self) -> None:
        """Close the file; what cannot be written by now is lost, with a warning."""
        self._append()
        if self._waiting:
            _log.warning("%s lacks its last %d line(s)", self._path, len(self._waiting))
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _append(self) -> None:
        try:
            while self._waiting:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = FileIO(self._path, "ab")
                # Unbuffered: a disk that fills up takes a part of a line, and the rest must follow it.
                self._waiting[0] = self._waiting[0][self._file.write(self._waiting[0]) :]
                if not self._waiting[0]:
                    self._waiting.popleft()
            self._is_refused = False
        except OSError as error:
            if not self._is_refused:
                _log.warning("%s is not written for now: %s", self._path, error)
            self._is_refused = True


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
