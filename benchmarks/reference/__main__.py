"""The reference run, from raw data to the table.

    MEGAMM_DATA=… python -m benchmarks.reference [--quick] [--parts main,detector,segmenter,speakers,folds,single,table]
        [--minutes N] [--keep]

Each part goes on where it stopped, so a run may be spread over as many commands as one likes. The table is made of what is there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks import results
from benchmarks.reference.parts import PARTS, Setting
from benchmarks.reference.table import kept, rows_of, show
from benchmarks.reference.work import Work
from megamm.core.env import apply_defaults
from megamm.core.errors import MegaMMError

NAME = "reference"
TABLE = "table"
_ALL = (*PARTS, TABLE)
_LIBRARIES = ("deepspeed", "jiwer", "pycocotools", "sacrebleu", "scikit-learn")


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for; 1 where one is not done or failed."""
    arguments = _parse(argv)
    # What is running here is told to stop, and commits a checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    apply_defaults()
    try:
        return _run(arguments)
    except MegaMMError as error:
        print(f"benchmarks.reference: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if not os.environ.get("MEGAMM_DATA"):
        raise MegaMMError("MEGAMM_DATA is not set; point it at the folder of the real test data")
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    folder = arguments.work / "quick" if arguments.quick else arguments.work
    work = Work(folder.absolute(), 1 if arguments.quick else arguments.ranks, end, arguments.quick)
    setting = Setting(work, Path(os.environ["MEGAMM_DATA"]).absolute(), arguments.recipe)
    done = {name: PARTS[name](setting) for name in arguments.parts if name != TABLE}
    if TABLE in arguments.parts:
        rows = rows_of(setting)
        if arguments.keep:
            rows = kept(rows, results.path_of(_name(arguments.recipe), quick=arguments.quick, folder=arguments.results))
        print(f"\n{show(rows)}")
        versions = results.installed_versions(_LIBRARIES)
        place = {"quick": arguments.quick, "folder": arguments.results}
        path = results.write(_name(arguments.recipe), _command(arguments), rows, versions=versions, **place)
        print(f"\n{path}")
    for name in [name for name, is_done in done.items() if not is_done]:
        print(f"{name} is not done; the same command goes on with it")
    return 0 if all(done.values()) else 1


def _name(recipe: str) -> str:
    """Of the table: another recipe's never takes the place of the reference's own."""
    return NAME if recipe == NAME else f"{NAME}_{Path(recipe).stem}"


def _command(arguments: argparse.Namespace) -> str:
    """What makes the table again: all options that change it and are not as they are by themselves."""
    words = ["python", "-m", "benchmarks.reference", *(["--quick"] if arguments.quick else [])]
    # A table of some parts goes by what the work folder holds of all; one that keeps rows of others is made anew by all parts alone.
    given = {"recipe": arguments.recipe, "work": str(arguments.work), "ranks": str(arguments.ranks), "parts": ",".join(arguments.parts)}
    usual = _parse([])
    if arguments.keep:
        del given["parts"]
    plain = {"recipe": usual.recipe, "work": str(usual.work), "ranks": str(usual.ranks), "parts": ",".join(usual.parts)}
    return " ".join([*words, *(word for name, value in given.items() if value != plain[name] for word in (f"--{name}", value))])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of each kind of run on a share of the data, below WORK/quick")
    parser.add_argument("--parts", type=_parts, default=_ALL, metavar="A,B,…", help=f"some of: {', '.join(_ALL)} (default: all)")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="N", help="train no longer than this; run again to go on")
    parser.add_argument("--keep", action="store_true", help="what this work folder lacks stays in the table as it is, and says so")
    parser.add_argument("--work", type=Path, default=Path("runs/reference"), help="folder of all that is kept (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a training run (default: %(default)s)")
    parser.add_argument("--recipe", default=NAME, help="recipe of the main model: a name or a TOML file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the table (default: %(default)s)")
    return parser.parse_args(argv)


def _parts(text: str) -> tuple[str, ...]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in _ALL]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; the parts are {', '.join(_ALL)}")
    return tuple(name for name in _ALL if name in chosen)


if __name__ == "__main__":
    sys.exit(main())
