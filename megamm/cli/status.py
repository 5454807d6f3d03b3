"""`megamm status`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from megamm.cli.command import Arguments, count

_CLEAR = "\x1b[H\x1b[2J"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folder, or a folder of runs")
    parser.add_argument("--json", action="store_true", help="everything as JSON, one run a line")
    parser.add_argument("--watch", type=count, default=None, metavar="SECONDS", help="look again every so often, until Ctrl-C")


def status(arguments: Arguments) -> None:
    while True:
        lines = _lines(arguments)
        if arguments.watch is not None and sys.stdout.isatty():
            print(_CLEAR, end="")
        print("\n".join(lines), flush=True)
        if arguments.watch is None:
            return
        time.sleep(arguments.watch)


def _lines(arguments: Arguments) -> list[str]:
    from megamm.status.run_status import find_runs, read_status
    from megamm.status.show import page, table

    found = read_status(list(dict.fromkeys(run for folder in arguments.folders for run in find_runs(folder))))
    if arguments.json:
        return [json.dumps(one.to_json(), ensure_ascii=False) for one in found]
    return page(found[0]) if len(found) == 1 else table(found)
