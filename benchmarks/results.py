"""What every benchmark writes: one JSON of rows with goals, and the table made from it."""

from __future__ import annotations

import operator
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil

from megamm.core.files import read_json, write_json, write_text

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("megamm", "torch", "numpy", "pillow", "soundfile", "tokenizers", "transformers", "webdataset", "xxhash")
_COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_GOAL = re.compile(r"(<=|>=|==|<|>) ?([-+0-9.e]+)\Z")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        row: What was measured.
        value: The figure; words where there is none (`not installed`).
        unit: Of the value; `×` for a ratio.
        goal: What the value must hold to, such as `<= 1.6`; empty for a figure that only stands beside others.
        spread: Lower and upper quartile of the repeats; None for a figure that does not vary.
        peer: What the figure is of, or is compared with.
    """

    row: str
    value: float | str
    unit: str = ""
    goal: str = ""
    spread: tuple[float, float] | None = None
    peer: str = ""

    def __post_init__(self) -> None:
        if self.goal and not _GOAL.match(self.goal):
            raise ValueError(f"row {self.row!r}: goal {self.goal!r} is no comparison with a number; write it like '<= 1.6'")

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; None without a goal. Words reach none."""
        if not self.goal:
            return None
        match = _GOAL.match(self.goal)
        assert match is not None, "checked when the row was made"
        return not isinstance(self.value, str) and _COMPARE[match.group(1)](self.value, float(match.group(2)))


def measured(row: str, repeats: Sequence[float], unit: str = "", *, goal: str = "", peer: str = "") -> Row:
    """A row of the median of interleaved repeats, with their quartiles."""
    if len(repeats) < 2:
        return Row(row, repeats[0], unit, goal, None, peer)
    lower, median, upper = quantiles(repeats, n=4, method="inclusive")
    return Row(row, median, unit, goal, (lower, upper), peer)


def write(
    name: str,
    command: str,
    rows: Iterable[Row],
    *,
    versions: Mapping[str, str] | None = None,
    quick: bool = False,
    folder: Path = RESULTS,
) -> Path:
    """Write `NAME.json` and `NAME.md`.

    Args:
        name: The benchmark.
        command: What makes these files again.
        rows: The figures in their order.
        versions: Of programs that are not packages of this environment.
        quick: A short run, whose figures are no result: it gets files of its own (`NAME-quick`) and never replaces one.
        folder: Where to.

    Returns:
        The JSON.
    """
    path = path_of(name, quick=quick, folder=folder)
    result = {
        "name": path.stem,
        "command": command,
        "versions": {**installed_versions(), **(versions or {})},
        "machine": machine(),
        "rows": [{**_rounded(asdict(row)), "holds": row.holds} for row in rows],
    }
    write_json(path, result)
    write_text(path.with_suffix(".md"), markdown(read_json(path)))
    return path


def path_of(name: str, *, quick: bool = False, folder: Path = RESULTS) -> Path:
    """The JSON that `write` makes; its table lies beside it."""
    return folder / f"{name}-quick.json" if quick else folder / f"{name}.json"


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a result, as it stands in its JSON."""
    lines = [
        f"# {result['name']}",
        "",
        f"`{result['command']}` on {_place(result['machine'])}. Versions: {_words(result['versions'])}.",
        "",
        "| row | value | quartiles | goal | holds | beside |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else " – ".join(map(_number, row["spread"]))
        holds = {None: "", True: "yes", False: "**no**"}[row["holds"]]
        value = f"{_number(row['value'])} {row['unit']}".strip()
        lines.append(f"| {row['row']} | {value} | {spread} | {row['goal']} | {holds} | {row['peer']} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What a reader must know of this machine to judge a figure; nothing that names it."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Package -> version, `not installed` where it is absent."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four significant digits are more than any of these figures carries."""

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    spread = row["spread"]
    return {**row, "value": short(row["value"]), "spread": None if spread is None else [short(one) for one in spread]}


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _place(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}"
    )


def _words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
