"""What becomes of damaged data, here and in webdataset with its strictest handler beside it.

    python -m benchmarks.data_faults [--quick] [--only WORDS …]

Every try goes the whole way of a run: index, planned lengths, plan, loader; a try is lost silently when a sample is missing, changed,
doubled or useless and no named error, no ledger entry says so. webdataset reads the same shards with `reraise_exception` and `.decode`.
Memory is the highest above what the process held before the try, checking the delivery against the truth included, decoder processes not.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import results
from benchmarks.faults.case import Tally
from benchmarks.faults.classes import FAULTS, Fault
from benchmarks.faults.measure import measure, new_pool
from megamm.core.files import read_json, write_json, write_text

NAME = "data_faults"
OURS, PEER = "megamm", "webdataset"
NUM_WORKERS = 2
Table = Mapping[str, Mapping[str, Tally]]
"""Class -> side -> tally."""


def run_table(faults: Sequence[Fault], *, quick: bool) -> dict[str, dict[str, Tally]]:
    """Try all classes on both sides."""
    # Memory-backed, because a million fsyncs on a disk would measure the disk.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch, new_pool(NUM_WORKERS) as pool:
        under_way = [
            (fault, side, pool.submit(measure, fault.name, side, fault.every if quick else 1, Path(scratch)))
            for fault in faults
            for side in ((OURS, PEER) if fault.peer else (OURS,))
        ]
        table: dict[str, dict[str, Tally]] = {}
        for fault, side, future in under_way:
            tally = table.setdefault(fault.name, {})[side] = future.result()
            print(f"{fault.name:45} {side:10} {tally.seconds:6.1f} s  {tally.counts}", flush=True)
            for verdict in ("crashed", "lost silently"):
                if side == OURS and verdict in tally.examples:
                    print(f"    {verdict}: {tally.examples[verdict]}", flush=True)
    return table


def rows_of(table: Table) -> list[results.Row]:
    """A figure a class with its goal; what webdataset lost stands beside it."""
    rows = []
    for name, sides in table.items():
        ours, peer = sides[OURS], sides.get(PEER)
        beside = "" if peer is None else f"webdataset {peer.counts.get('lost silently', 0)} of {peer.tries}"
        lost = ours.counts.get("lost silently", 0) + ours.counts.get("crashed", 0)
        rows.append(results.Row(name, lost, f"of {ours.tries} lost silently", "== 0", None, beside))
    executed = {side: sum(sides[side].executed for sides in table.values() if side in sides) for side in (OURS, PEER)}
    rows.append(results.Row("code out of data that ran", executed[OURS], "tries", "== 0", None, f"webdataset {executed[PEER]}"))
    peaks = {side: max(sides[side].peak_bytes for sides in table.values() if side in sides) / 2**20 for side in (OURS, PEER)}
    rows.append(results.Row("highest memory of any try", peaks[OURS], "MiB", "", None, f"webdataset {peaks[PEER]:.0f}"))
    return rows


def markdown(table: Table) -> str:
    """The table that people read."""
    lines = [
        "| fault | tries | detected | recovered | unharmed | lost silently | peak MB "
        "| webdataset: detected | lost silently | executed code | peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, sides in table.items():
        ours, peer = sides[OURS], sides.get(PEER)
        cells = [ours.tries, ours.detected, ours.counts.get("recovered", 0), ours.counts.get("unharmed", 0)]
        cells += [ours.counts.get("lost silently", 0) + ours.counts.get("crashed", 0), ours.peak_bytes // 10**6]
        beside = ["–"] * 4
        if peer is not None:
            beside = [
                peer.detected,
                f"**{lost}**" if (lost := peer.counts.get("lost silently", 0)) else 0,
                peer.executed,
                peer.peak_bytes // 10**6,
            ]
        lines.append(f"| {name} | {' | '.join(str(cell) for cell in [*cells, *beside])} |")
    return "\n".join(lines) + "\n"


def write(table: Table, command: str, *, quick: bool, folder: Path = results.RESULTS) -> Path:
    """Write the benchmark's JSON and table, with every count beside the goals."""
    path = results.write(NAME, command, rows_of(table), quick=quick, folder=folder)
    result = read_json(path)
    result["faults"] = {name: {side: asdict(tally) for side, tally in sides.items()} for name, sides in table.items()}
    write_json(path, result)
    text = path.with_suffix(".md")
    write_text(text, f"{text.read_text(encoding='utf-8')}\n## {' '.join(NAME.split('_')).capitalize()}\n\n{markdown(table)}")
    return path


def merged(table: Table, path: Path) -> dict[str, Mapping[str, Tally]]:
    """The result that is there with some classes tried anew: classes do not depend on each other, and nothing in them is a time."""
    before = read_json(path)["faults"] if path.exists() else {}
    known = {name: {side: Tally(**tally) for side, tally in sides.items()} for name, sides in before.items()} | table
    return {fault.name: known[fault.name] for fault in FAULTS if fault.name in known}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The fault table of the data layer.")
    parser.add_argument("--quick", action="store_true", help="a sample of the offsets and bits, in less than a minute")
    parser.add_argument(
        "--only", nargs="+", metavar="WORDS", help="classes whose name holds one of these, put into the result that is there"
    )
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if fault.every or not options.quick]
    if options.only:
        faults = [fault for fault in faults if any(words in fault.name for words in options.only)]
    table = run_table(faults, quick=options.quick)
    command = f"python -m benchmarks.{NAME}" + " --quick" * options.quick
    if options.only:
        path = results.RESULTS / f"{NAME}{'-quick' * options.quick}.json"
        table = merged(table, path)
        # The result says which classes were tried later than the rest.
        again = f"--only {' '.join(map(repr, options.only))}"
        command = f"{read_json(path)['command']}, then {again}" if path.exists() else f"{command} {again}"
    print(write(table, command, quick=options.quick).with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
