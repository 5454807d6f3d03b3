"""What an evaluation has done so far, on disk, so that one that was killed goes on where it stopped, at any number of ranks.

Every start of every rank appends to a file of its own under `OUTPUT/.progress`; all of them together say what is done. They belong
to one evaluation: another checkpoint, other data or other settings begin anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megamm.checkpoint.manifest import MANIFEST
from megamm.core import locks
from megamm.core.files import canonical_json, digest_file, digest_text, read_json, write_json
from megamm.core.json_lines import JsonLines, read_json_lines
from megamm.core.logging import get_logger
from megamm.evaluation.records import Identity, Result, result_from_json
from megamm.inference.load import Loaded

FOLDER = ".progress"
_IDENTITY = "identity.json"
_log = get_logger("evaluation")


class Progress:
    """Results of one evaluation as they come.

    State: this rank's open file.

    Args:
        output: The evaluation's folder; None keeps nothing on disk.
        rank: Of this process.
        start: Which start this is, from `begin`; the same on all ranks.
    """

    def __init__(self, output: Path | None, rank: int, start: int):
        self._file = None if output is None else JsonLines(output / FOLDER / f"start_{start:05}.rank_{rank:05}.jsonl")

    def write(self, result: Result) -> None:
        """Keep a result."""
        if self._file is not None:
            self._file.write(result.to_json())

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()


def alone(output: Path) -> AbstractContextManager[None]:
    """Hold the folder of an evaluation, made where it is missing: two in one would take each other's results for their own.

    Raises:
        DataError: Another evaluation holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    return locks.alone(output, f"another evaluation writes into {output} at this moment; wait for it, or name another --output")


def contents_of(loaded: Loaded) -> str:
    """What tells a model from another one that lay in the same place: its checkpoint's manifest, or the files of an exported folder."""
    if loaded.step is not None:
        return (loaded.source / MANIFEST).read_text(encoding="utf-8")
    files = sorted(path for ending in ("*.safetensors", "*.json") for path in loaded.source.glob(ending))
    return canonical_json({path.name: digest_file(path) for path in files})


def begin(output: Path, identity: Mapping[str, Any]) -> int:
    """Make room for an evaluation; one process calls this before any other reads.

    Args:
        output: The evaluation's folder.
        identity: All that its results depend on, as JSON values.

    Returns:
        The number of this start.
    """
    folder, digest = output / FOLDER, digest_text(canonical_json(dict(identity)))
    if folder.exists() and _digest(folder) != digest:
        _log.warning("%s holds a part of another evaluation, which begins anew", output)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _IDENTITY, {"digest": digest})
    return 1 + max((int(path.name.split(".")[0].removeprefix("start_")) for path in folder.glob("start_*.jsonl")), default=0)


def results_so_far(output: Path | None) -> dict[Identity, Result]:
    """What earlier starts, and this one's ranks, have found: each sample once."""
    if output is None:
        return {}
    found = {}
    for path in sorted((output / FOLDER).glob("start_*.jsonl")):
        for value in read_json_lines(path):
            result = result_from_json(value)
            found[result.identity] = result
    return found


def end(output: Path) -> None:
    """The report is written: clear the progress away."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)


def _digest(folder: Path) -> str:
    try:
        value = read_json(folder / _IDENTITY)
    except (OSError, ValueError):
        return ""
    return value.get("digest", "") if isinstance(value, dict) else ""
