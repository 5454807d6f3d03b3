"""What nvidia-smi says of a node's GPUs, and what of it is a fault. Without nvidia-smi there is nothing to say.

Source: `nvidia-smi --help-query-gpu` and `--help-query-remapped-rows`.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

_SECONDS = 30
_FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
)
_REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
# Drivers renamed these with 535: which of the two one still knows is found by asking.
_REASON_PREFIXES = ("clocks_event_reasons", "clocks_throttle_reasons")
_REASONS = ("hw_thermal_slowdown", "hw_power_brake_slowdown")
_FAULTS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since its last reset",
    "hw_thermal_slowdown": "slowed down by its own temperature",
    "hw_power_brake_slowdown": "slowed down by the power supply",
    "remapped_rows.pending": "memory rows to be remapped by a reset",
    "remapped_rows.failure": "memory rows that could not be remapped",
}
_FINE = ("0", "no", "not active", "none", "", "[n/a]", "n/a", "[not supported]")


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of a node.

    Attributes:
        num_gpus: How many nvidia-smi lists; None where it is not installed.
        names: Their kinds, each once.
        driver: Version of the driver.
        clocks_mhz: Present and highest clock of each.
        faults: What is wrong, a line a GPU and fault.
    """

    num_gpus: int | None = None
    names: tuple[str, ...] = ()
    driver: str = ""
    clocks_mhz: tuple[tuple[str, str], ...] = ()
    faults: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def look() -> Gpus:
    """Ask nvidia-smi; one that fails is a fault."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Gpus()
    rows, problem = _query(program, "--query-gpu", _FIELDS)
    if problem:
        return Gpus(num_gpus=0, faults=(problem,))
    more = _more(program)
    for row in rows:
        row |= more.get(row["uuid"], {})
    return Gpus(
        num_gpus=len(rows),
        names=tuple(sorted({row["name"] for row in rows})),
        driver=rows[0]["driver_version"] if rows else "",
        clocks_mhz=tuple((row["clocks.sm"], row["clocks.max.sm"]) for row in rows),
        faults=tuple(fault for row in rows for fault in faults_of(row)),
    )


def faults_of(row: dict[str, str]) -> list[str]:
    """What is wrong with one GPU, in words."""
    bad = [(name, value) for name, value in row.items() if name in _FAULTS and value.strip().lower() not in _FINE]
    return [f"GPU {row['index']}: {_FAULTS[name]} ({name}={value})" for name, value in bad]


def _more(program: str) -> dict[str, dict[str, str]]:
    """UUID -> what not every card and driver can be asked for: those refuse the query, which is no fault."""
    remapped, _ = _query(program, "--query-remapped-rows", _REMAPPED)
    more = {row.pop("gpu_uuid"): row for row in remapped}
    for prefix in _REASON_PREFIXES:
        rows, problem = _query(program, "--query-gpu", ("uuid", *(f"{prefix}.{name}" for name in _REASONS)))
        if not problem:
            for uuid, *values in (row.values() for row in rows):
                more.setdefault(uuid, {}).update(zip(_REASONS, values, strict=False))
            break
    return more


def _query(program: str, option: str, names: tuple[str, ...]) -> tuple[list[dict[str, str]], str]:
    """A row a GPU, and why there is none."""
    command = [program, f"{option}={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    if answer.returncode:
        lines = (answer.stdout + answer.stderr).strip().splitlines() or [f"code {answer.returncode}"]
        return [], f"nvidia-smi fails: {lines[-1]}"
    rows = [dict(zip(names, (cell.strip() for cell in row), strict=False)) for row in csv.reader(answer.stdout.splitlines())]
    return rows, ""
