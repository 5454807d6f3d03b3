"""What nvidia-smi says of a node's GPUs, and what of it is a fault. Without nvidia-smi there is nothing to say.

Source: `nvidia-smi --help-query-gpu` and `--help-query-remapped-rows`.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

_SECONDS = 60
_FIELDS = (
    "index",
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)
_FAULTS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since its last reset",
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowed down by its own temperature",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "slowed down by the power supply",
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
    # Cards without row remapping refuse this query; that is no fault.
    remapped, _ = _query(program, "--query-remapped-rows", ("remapped_rows.pending", "remapped_rows.failure"))
    for row, more in zip(rows, remapped, strict=False):
        row |= more
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
