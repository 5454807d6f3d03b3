"""What is already done, kept on disk so that a killed command goes on where it was.

`OUTPUT/.prepare/SPLIT.json` says what the split is made from; nothing else may be written into it.
`OUTPUT/.prepare/SPLIT.part-I-of-N.jsonl` has a line for every finished shard, written after the shard has its name; each part appends to
its own file and reads all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamm.core.errors import DataError
from megamm.core.files import read_json, sync_folder, write_json
from megamm.core.locks import alone
from megamm.prepare.shard import Finished

_CONSEQUENCES = ("inputs", "records")


class Journal:
    """Finished shards of one split. State: the files in `OUTPUT/.prepare`; a line that a kill cut is as if it were not there."""

    def __init__(self, output: Path, split: str, part: tuple[int, int]) -> None:
        """Open or begin the journal of a part.

        Args:
            output: Folder of the shards.
            split: Name of the split.
            part: This part and the number of parts.
        """
        self._output, self._split = output, split
        self._folder = output / ".prepare"
        self._part = f"{part[0]}/{part[1]}"
        self._path = self._folder / f"{split}.part-{part[0]}-of-{part[1]}.jsonl"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold this part of the split, so that no second command writes it at the same time.

        Raises:
            DataError: Another command holds it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._path.with_suffix(".lock")
        lock.touch()
        busy = (
            f"another command writes part {self._part} of {self._output} ({self._split}) at this moment; wait for it, or let each "
            "write its own --part"
        )
        # Without locks the journal still keeps two commands with other words apart.
        with alone(lock, busy):
            yield

    def claim(self, facts: Mapping[str, Any]) -> None:
        """Take the split for this plan, or find that it is taken for it.

        Args:
            facts: JSON values that decide every byte of the shards.

        Raises:
            DataError: The split was begun from something else, or its shards are there without a journal.
        """
        if not self.is_begun(facts):
            write_json(self._path_of_facts, dict(facts))

    def is_begun(self, facts: Mapping[str, Any]) -> bool:
        """Whether the split is taken for this plan already; takes nothing.

        Args:
            facts: As of `claim`; those that follow from records that are not known yet may be missing.

        Raises:
            DataError: As `claim`.
        """
        path = self._path_of_facts
        if not path.exists():
            existing = sorted(self._output.glob(f"{self._split}-*.tar*"))
            # Another part may have begun and written shards since the first look.
            if existing and not path.exists():
                raise DataError(f"{self._output} already holds {existing[0].name}; name another --output, or {self._remedy()}")
            if not path.exists():
                return False
        self._compare(read_json(path), facts)
        return True

    def finished(self) -> dict[str, Finished]:
        """Finished shards of all parts, by name."""
        found: dict[str, Finished] = {}
        for path in sorted(self._folder.glob(f"{self._split}.part-*-of-*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    finished = Finished.from_json(json.loads(line)) if line.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError):
                    finished = None  # a power cut may leave anything; that shard is written again
                if finished is not None:
                    found[finished.name] = finished
        return found

    def append(self, finished: Finished) -> None:
        """Note that a shard is finished; on disk when this returns."""
        is_new = not self._path.exists()
        with self._path.open("r+b" if not is_new else "x+b") as file:
            whole = file.read().rfind(b"\n") + 1
            file.seek(whole)
            file.truncate()
            file.write(json.dumps(finished.to_json(), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self._folder)

    @property
    def _path_of_facts(self) -> Path:
        return self._folder / f"{self._split}.json"

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        names = (before.keys() | now.keys()) - (set(_CONSEQUENCES) - now.keys())
        # What the user chose comes before what follows from it.
        for name in sorted(names, key=lambda name: (name in _CONSEQUENCES, name)):
            if before.get(name) != now.get(name):
                raise DataError(
                    f"{self._output} holds {self._split} shards that were begun with {name} {_brief(before.get(name))}, now it is "
                    f"{_brief(now.get(name))}; repeat the first command, name another --output, or {self._remedy()}"
                )

    def _remedy(self) -> str:
        return f"remove its {self._split}-* and .prepare/{self._split}.* to write them anew"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "..."
