"""The drill table as it is kept: a row a fault, written as soon as it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.drills.drill import Tally
from megamm.core.files import read_json, write_json, write_text
from megamm.core.tables import markdown

NAME = "drills"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row: what became of a drill's tries, how long it took, and whether ranks with the engine took part."""

    tally: Tally
    seconds: float
    with_engine: bool = False


Table = Mapping[str, Outcome]
"""Fault -> outcome, in the order of the table."""


def path_of(*, quick: bool, folder: Path = results.RESULTS) -> Path:
    """The JSON of the normal table, or of the quick one."""
    return folder / f"{NAME}{'-quick' * quick}.json"


def read(path: Path) -> tuple[dict[str, Outcome], str]:
    """The rows that are there and the command that made them; nothing where there are none."""
    if not path.exists():
        return {}, ""
    result = read_json(path)
    rows = {fault: Outcome(Tally(**row.pop("tally")), **row) for fault, row in result["drills"].items()}
    return rows, result["command"]


def write(table: Table, command: str, *, quick: bool, folder: Path = results.RESULTS) -> Path:
    """Write the benchmark's JSON and Markdown, every count beside the goals."""
    rows = [_row(fault, outcome.tally) for fault, outcome in table.items()]
    versions = results.installed_versions(("torch", "deepspeed", "safetensors", "xxhash"))
    path = results.write(NAME, command, rows, versions=versions, quick=quick, folder=folder)
    result = read_json(path)
    result["drills"] = {fault: asdict(outcome) for fault, outcome in table.items()}
    write_json(path, result)
    text = path.with_suffix(".md")
    write_text(text, "\n".join([*_header(result), "", *lines_of(table), ""]))
    return path


def lines_of(table: Table) -> list[str]:
    """The table that people read."""
    header = ["fault", "tries", "survived", "lost", "seconds", "engine", "note"]
    return markdown(
        header,
        [
            [fault, tally.tries, tally.survived, tally.lost, round(outcome.seconds), "yes" if outcome.with_engine else "", tally.note]
            for fault, outcome in table.items()
            for tally in (outcome.tally,)
        ],
    )


def _row(fault: str, tally: Tally) -> results.Row:
    # A drill that could not be tried here proves nothing, and must not look as if it had.
    return results.Row(fault, tally.lost if tally.tries else "not tried", f"of {tally.tries} lost", "== 0", None, tally.note)


def _header(result: Mapping[str, Any]) -> list[str]:
    return results.markdown({**result, "rows": []}).splitlines()[:3]
