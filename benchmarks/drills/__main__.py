"""What checkpoints and runs survive: faults put to them on purpose, and what came of every try.

    python -m benchmarks.drills [--quick | --full] [--only NAME ...] [--output FOLDER]

A try is lost when it ends in any way but the right one: a state that is not the saved one, damage that nobody noticed, a run that
cannot go on, something left behind. Rows are written as they come. A row that is tried again alone replaces itself (`--only`).
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from megamm.core.env import apply_defaults

# One thread a process, as ranks that share a machine have; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
apply_defaults()

from benchmarks import results  # noqa: E402
from benchmarks.drills import chains, damage, disks, engine, foreign, full_disk, kills, owners, pickles, power, table  # noqa: E402
from benchmarks.drills.drill import Drill, Size, Tally  # noqa: E402
from benchmarks.drills.table import Outcome  # noqa: E402

MODULES = {
    "kills": kills,
    "power": power,
    "damage": damage,
    "foreign": foreign,
    "owners": owners,
    "disks": disks,
    "full_disk": full_disk,
    "pickles": pickles,
    "chains": chains,
    "engine": engine,
}
"""Every module of drills, in the order of the table."""
DRILLS = {drill.fault: drill for module in MODULES.values() for drill in module.DRILLS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run drills and write their rows; 1 where a try was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__.partition("\n")[0])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="a short form of each, written beside the table")
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="add the long ones")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="drills whose fault holds one of these words, or a module's name")
    parser.add_argument("--output", type=Path, default=results.RESULTS, help="folder of the table")
    options = parser.parse_args(arguments)
    size: Size = options.size or "normal"
    drills = chosen(options.only)
    if not drills:
        names = "\n  ".join([", ".join(MODULES), *DRILLS])
        parser.error(f"no drill is named like {' or '.join(map(repr, options.only))}; modules and faults are\n  {names}")
    # What drills provoke is told by the table.
    logging.getLogger("megamm").setLevel(logging.CRITICAL)
    command = "python -m benchmarks.drills" + {"quick": " --quick", "normal": "", "full": " --full"}[size]
    rows = run_all(drills, size, command, folder=options.output, only=options.only or [])
    print("\n".join(table.lines_of(rows)))
    return int(any(rows[drill.fault].tally.lost for drill in drills))


def chosen(only: Sequence[str] | None) -> list[Drill]:
    """The drills of some modules, or whose faults hold some words; all without any."""
    if not only:
        return list(DRILLS.values())
    modules, words = [name for name in only if name in MODULES], [name for name in only if name not in MODULES]
    return [
        drill
        for name, module in MODULES.items()
        for drill in module.DRILLS
        if name in modules or any(word in drill.fault for word in words)
    ]


def run_all(drills: Sequence[Drill], size: Size, command: str, *, folder: Path, only: Sequence[str]) -> dict[str, Outcome]:
    """Run drills one after the other and write the table after each; those of `only` go into the table that is there."""
    quick = size == "quick"
    path = table.path_of(quick=quick, folder=folder)
    rows, before = table.read(path) if only else ({}, "")
    again = f"--only {' '.join(map(repr, only))}"
    done = (f"{before}, then {again}" if before else f"{command} {again}") if only else command
    folder.mkdir(parents=True, exist_ok=True)
    for number, drill in enumerate(drills, start=1):
        outcome = run_one(drill, size)
        # As it is by now: another one may run other drills beside this one.
        rows = (table.read(path)[0] if only else rows) | {drill.fault: outcome}
        rows = {fault: rows[fault] for fault in DRILLS if fault in rows}
        tally = outcome.tally
        print(f"{drill.fault}: {tally.tries} tries, {tally.lost} lost, {outcome.seconds:.1f} s {tally.note}", file=sys.stderr, flush=True)
        under_way = "" if number == len(drills) else f" (cut short after {number} of {len(drills)} drills)"
        table.write(rows, done + under_way, quick=quick, folder=folder)
    return rows


def run_one(drill: Drill, size: Size) -> Outcome:
    """Run a drill in a folder of its own; one that fails is a loss, and those after it are still run."""
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    try:
        tally = drill.run(size, folder)
    except Exception as error:
        traceback.print_exc()
        tally = Tally.of([f"the drill ended with {type(error).__name__}: {error}"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(tally, round(time.monotonic() - started, 1), drill.needs_engine)


if __name__ == "__main__":
    sys.exit(main())
