"""What a cluster does to a job, and what becomes of the run.

    python -m benchmarks.slurm_events [--only WORDS …]

A real Slurm (`tests/support/slurm`: root, Debian's slurm-wlm and munge), two nodes with two fake GPUs each, gloo, a small recipe. Each
event happens to a run that `sbatch slurm/pretrain.sh` started, on a cluster of its own; afterwards the run is held against one that
nothing happened to: samples of every step, losses, weights of the last checkpoint bit for bit. The result is written after every event.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import results, slurm_strikes
from benchmarks.slurm_strikes import Seen, Yard
from megamm.core.files import read_json, write_json, write_text
from tests.support.slurm import packages
from tests.support.slurm.cluster import Cluster

NAME = "slurm_events"
LOSS_TOLERANCE = 0.005
"""Of bf16 losses around 5, where another number of ranks adds in another order."""


@dataclass(frozen=True)
class Event:
    """A line of the table.

    Attributes:
        name: What happens.
        expected: What is to become of the job, as `Seen.outcome` says it.
        strike: Does it.
        num_nodes: Of the cluster.
    """

    name: str
    expected: str
    strike: Callable[[Cluster, Yard, Path], Seen]
    num_nodes: int = 2


_RESUMED = "COMPLETED, 1 restart"
EVENTS = (
    Event("time limit", _RESUMED, slurm_strikes.time_limit),
    Event("preemption with grace", _RESUMED, slurm_strikes.preemption_with_grace),
    Event("preemption without grace", _RESUMED, slurm_strikes.preemption_without_grace),
    Event("scancel", "CANCELLED, 0 restarts; then anew; COMPLETED, 0 restarts", slurm_strikes.cancelled),
    Event("crash of a rank", _RESUMED, slurm_strikes.crash),
    Event("hang of a rank", f"{_RESUMED}; stall recorded", slurm_strikes.hang),
    Event("power-off, a spare node", _RESUMED, slurm_strikes.power_off_with_a_spare_node, 3),
    Event("power-off, none spare", f"{_RESUMED}; on 1 node", slurm_strikes.power_off_without_one),
    Event("network partition of one of two nodes", f"{_RESUMED}; on 1 node", slurm_strikes.partition),
    Event("network partition of a whole job", f"{_RESUMED}; the old one's commit refused", slurm_strikes.cut_off_but_alive),
    Event("restart of slurmctld", "COMPLETED, 0 restarts", slurm_strikes.controller_restart),
    Event("a crash in every start", "FAILED, 2 restarts; gave up", slurm_strikes.no_progress),
)


def happen(event: Event, yard: Yard) -> Seen:
    """Let it happen; what went wrong with that is what was seen."""
    run = yard.folder / event.name.replace(" ", "-").replace(",", "")
    try:
        with Cluster(event.num_nodes) as cluster:
            return event.strike(cluster, yard, run)
    except Exception as error:
        traceback.print_exc()
        return Seen(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def rows_of(seen: Mapping[str, Seen]) -> list[results.Row]:
    """The figures of each event, each with its goal."""
    rows = []
    for event in EVENTS:
        if (one := seen.get(event.name)) is None:
            continue
        rows.append(results.Row(f"{event.name}: ends as expected", int(one.outcome == event.expected), "", "== 1", None, one.outcome))
        if one.resume_seconds is not None:
            rows.append(results.Row(f"{event.name}: time to resume", one.resume_seconds, "s"))
            rows.append(results.Row(f"{event.name}: steps trained again", one.num_steps_again))
        if one.num_wrong_samples is not None:
            rows.append(results.Row(f"{event.name}: samples lost or repeated", one.num_wrong_samples, "", "== 0"))
        if one.num_unequal_tensors is not None:
            rows.append(results.Row(f"{event.name}: weights that differ from the unbroken run's", one.num_unequal_tensors, "", "== 0"))
        elif one.loss_difference is not None:
            goal = f"<= {LOSS_TOLERANCE}"
            rows.append(results.Row(f"{event.name}: largest difference of a step's loss", one.loss_difference, "", goal))
    return rows


def markdown(seen: Mapping[str, Seen]) -> str:
    """The table that people read."""
    lines = [
        "| event | expected | seen | time to resume | steps trained again | samples lost or repeated | against the unbroken run |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for event in EVENTS:
        if (one := seen.get(event.name)) is None:
            continue
        outcome = "as expected" if one.outcome == event.expected else f"**{one.outcome.replace('|', '/')}**"
        cells = [event.name, event.expected, outcome]
        cells += ["–", "–"] if one.resume_seconds is None else [f"{one.resume_seconds:.0f} s", str(one.num_steps_again)]
        cells += ["–" if one.num_wrong_samples is None else str(one.num_wrong_samples), _against(one)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(seen: Mapping[str, Seen], command: str, *, folder: Path = results.RESULTS) -> Path:
    """Write the benchmark's JSON and table."""
    path = results.write(NAME, command, rows_of(seen), versions=results.installed_versions(("deepspeed",)), folder=folder)
    write_json(path, {**read_json(path), "events": {name: asdict(one) for name, one in seen.items()}})
    text = path.with_suffix(".md")
    write_text(text, f"{text.read_text(encoding='utf-8')}\n## Slurm events\n\n{markdown(seen)}")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="events whose name holds one of these, into the result that is there")
    options = parser.parse_args(arguments)
    packages.install()
    if reason := packages.missing():
        raise SystemExit(f"no test cluster here: {reason}")
    path = results.RESULTS / f"{NAME}.json"
    before = read_json(path) if options.only and path.exists() else {}
    seen = {name: Seen(**one) for name, one in before.get("events", {}).items()}
    command = f"python -m benchmarks.{NAME}"
    if options.only:
        again = f"--only {' '.join(map(repr, options.only))}"
        command = f"{before['command']}, then {again}" if before else f"{command} {again}"
    with tempfile.TemporaryDirectory(prefix="slurm-events-") as folder:
        yard = Yard(Path(folder))
        for event in EVENTS:
            if not options.only or any(words in event.name for words in options.only):
                began = time.monotonic()
                seen[event.name] = happen(event, yard)
                print(f"{event.name:40} {time.monotonic() - began:5.0f} s  {seen[event.name]}", flush=True)
                write(seen, command)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def _against(one: Seen) -> str:
    if one.loss_difference is None:
        return "–"
    if one.num_unequal_tensors is None:
        return f"losses within {one.loss_difference:.2g}"
    return "weights bit-equal" if one.num_unequal_tensors == 0 else f"**{one.num_unequal_tensors} tensors differ**"


if __name__ == "__main__":
    main()
