"""The quick start: the ordinary subcommands one after the other, each printed before it runs, and a table at the end.

Needs the standard library only; `make quickstart` sets up the environment and calls it. Everything is written below
`quickstart/` in the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
MARKER = ".megamm-quickstart"


def main() -> int:
    """Run all steps; the exit code is not 0 when a step fails or a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "quickstart", help="where everything is written")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps (default: the recipe's)")
    arguments = parser.parse_args()
    folder = fresh_folder(arguments.folder)
    started = time.monotonic()

    extra = ["--train.steps", str(arguments.steps)] if arguments.steps else []
    launcher = [os.path.relpath(CHECKOUT / "launchers" / "local.sh", folder), str(arguments.ranks)]
    pretrain = [*launcher, "megamm", "pretrain", "tiny", *extra]

    for source, output in (("digits", "data/digits"), ("words", "data/words"), ("digit_text", "data/text")):
        run(folder, ["megamm", "prepare", source, "--output", output])
    run(folder, ["megamm", "tokenizer", "tiny"])
    run(folder, ["megamm", "data", "plan-lengths", "tiny"])

    say("An unbroken run, to compare with")
    run(folder, [*pretrain, "--run", "runs/unbroken"])
    say("The same run again, stopped by SIGTERM half way, then resumed by the same command")
    stopped_at = run_and_stop_half_way(folder, [*pretrain, "--run", "runs/tiny"], folder / "runs" / "unbroken", folder / "runs" / "tiny")
    run(folder, [*pretrain, "--run", "runs/tiny"])

    run(folder, ["megamm", "evaluate", "runs/tiny", "--output", "evaluation"])
    run(folder, ["megamm", "export", "runs/tiny", "--output", "export"])
    run(folder, [sys.executable, os.path.relpath(CHECKOUT / "launchers" / "ask_export.py", folder), "export", "data"])
    return table(folder, stopped_at, time.monotonic() - started)


def fresh_folder(folder: Path) -> Path:
    """Make `folder` new; only a folder that an earlier quick start made is removed."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            sys.exit(f"{folder} is not empty and no quick start made it; name another with --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def say(text: str) -> None:
    """A headline between commands."""
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def show(command: list[str]) -> None:
    """Print a command as a user would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    line = "$ " + shlex.join(words)
    print(f"\n\033[1;32m{line}\033[0m" if sys.stdout.isatty() else f"\n{line}", flush=True)


def run(folder: Path, command: list[str]) -> None:
    """Run one subcommand in `folder`; end with its code when it fails."""
    show(command)
    code = subprocess.run(command, cwd=folder, check=False).returncode
    if code:
        sys.exit(code)


def run_and_stop_half_way(folder: Path, command: list[str], unbroken: Path, interrupted: Path) -> int:
    """Start training, send SIGTERM once half of the unbroken run's steps are done, and return the step it stopped at."""
    half = len(steps_of(unbroken)) // 2
    show(command)
    process = subprocess.Popen(command, cwd=folder)
    while process.poll() is None and len(steps_of(interrupted)) < half:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait()
    marker = interrupted / "INTERRUPTED"
    if not marker.is_file():
        sys.exit(f"the interrupted run left no {marker}; see {interrupted / 'logs'}")
    step = json.loads(marker.read_text())["step"]
    print(f"stopped by SIGTERM after step {step}; checkpoint committed", flush=True)
    return step


def steps_of(run_folder: Path) -> dict[int, dict]:
    """The lines of a run's metrics.jsonl by step."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line for line in parsed if "loss" in line}


def table(folder: Path, stopped_at: int, seconds: float) -> int:
    """Print what was measured beside what is wanted; return 1 when a goal is missed."""
    unbroken, resumed = steps_of(folder / "runs" / "unbroken"), steps_of(folder / "runs" / "tiny")
    after = [step for step in unbroken if step > stopped_at]
    difference = max(abs(unbroken[step]["loss"] - resumed[step]["loss"]) for step in after)
    same_keys = sum(unbroken[step]["sample_keys"] == resumed[step]["sample_keys"] for step in after)
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    parity = json.loads((folder / "export" / "parity.json").read_text())
    last = max(unbroken)
    rows = [
        ("steps; stopped and resumed after", f"{last}; {stopped_at}", "", True),
        ("loss, first → last step", f"{unbroken[min(unbroken)]['loss']:.3f} → {unbroken[last]['loss']:.3f}", "", True),
        ("resumed against unbroken: largest loss difference", f"{difference:g}", "0", difference == 0),
        ("resumed against unbroken: steps with equal sample keys", f"{same_keys} of {len(after)}", "all", same_keys == len(after)),
    ]
    for dataset in ("digits", "words"):
        row = next(row for row in report["rows"] if row["dataset"] == dataset and row["metric"] == "accuracy")
        name = f"{dataset} held out: accuracy over {row['samples']} (chance {row['chance']:.2f})"
        rows.append((name, f"{row['value']:.3f}", "≥ 0.90", row["value"] >= 0.90))
    worst = max(parity["probes"], key=lambda probe: probe["max_logit_difference"] / probe["tolerance"])
    name = f"exported, fresh process, against trained: largest logit difference over {len(parity['probes'])} probes"
    rows.append((name, f"{worst['max_logit_difference']:.2g}", f"≤ {worst['tolerance']:.2g}", parity["holds"]))
    rows.append(("minutes, set-up left out", f"{seconds / 60:.1f}", "≤ 10", seconds <= 600))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    print(f"  {'what':<{widths[0]}}  {'measured':>{widths[1]}}  {'wanted':>{widths[2]}}")
    for what, measured, wanted, holds in rows:
        verdict = "" if not wanted else "holds" if holds else "MISSED"
        print(f"  {what:<{widths[0]}}  {measured:>{widths[1]}}  {wanted:>{widths[2]}}  {verdict}")
    print(f"\nThe trained model is in {folder / 'export'}; load it with transformers as its README.md says.")
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
