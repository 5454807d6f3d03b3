"""Whether the checkpoints of a run fit on the file system of its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megamm.config import Recipe, to_dict
from megamm.core.files import canonical_json
from megamm.status.saves import newest_saved
from megamm.status.units import count, num_bytes
from megamm.submit.finding import Finding, good, note, problem
from megamm.submit.job import Plan

# Weight and both moments of AdamW in float32; a frozen parameter has its weight alone.
_BYTES_A_TRAINED = 12
_BYTES_A_FROZEN = 4
_COUNT_SECONDS = 300.0
# Manifest, state of the data, ledger; and the folder itself.
_FILES_BESIDE_RANKS = 4


def existing(path: Path) -> Path:
    """The nearest folder above a path that is there already: what says on which file system it will lie."""
    return next(one for one in (path, *path.parents) if one.is_dir())


def check_space(plan: Plan) -> Iterator[Finding]:
    """Bytes and inodes for the checkpoints that are kept, and for the one that is written before an older one goes."""
    recipe, run = plan.trained
    settings, folder = recipe.checkpoint, existing(run)
    system = os.statvfs(folder)
    free_bytes, num_free_inodes = system.f_bavail * system.f_frsize, system.f_favail
    size, source = _checkpoint_bytes(recipe, run)
    num_kept = settings.keep_last + 1
    num_files = num_kept * (plan.world_sizes[-1] + _FILES_BESIDE_RANKS)
    # Some file systems count no inodes and say 0 of 0.
    if system.f_files and num_files > num_free_inodes:
        yield problem(f"{folder} has {num_free_inodes:,} inodes left, {num_kept:,} checkpoints take {num_files:,}; name a --run elsewhere")
    if size is None:
        yield note(f"{num_bytes(free_bytes)} free on {folder}; what a checkpoint takes is not known: {source}")
        return
    wanted = max(0, num_kept * size - _held_bytes(run / "checkpoints"))
    text = f"{num_kept:,} checkpoints of {num_bytes(size)} ({source}), {num_bytes(free_bytes)} free on {folder}"
    if wanted > free_bytes:
        yield problem(f"{text}: {num_bytes(wanted - free_bytes)} short; make room, lower checkpoint.keep_last, or name a --run elsewhere")
    else:
        yield good(text)
    num_forever = recipe.train.steps // settings.keep_every if settings.keep_every else 0
    if num_forever and wanted <= free_bytes < wanted + num_forever * size:
        yield note(f"checkpoint.keep_every={settings.keep_every} keeps {num_forever:,} more for ever: {num_bytes(num_forever * size)}")


def _checkpoint_bytes(recipe: Recipe, run: Path) -> tuple[int | None, str]:
    """Size of a checkpoint and where the figure is from; None and why where there is none."""
    if run.is_dir() and (saved := newest_saved(run)[0]) is not None:
        return saved.num_bytes, f"as that of step {saved.step}"
    try:
        counts = _count_parameters(recipe)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return None, f"parameters are counted with torch, which failed here ({_reason(error)})"
    size = _BYTES_A_TRAINED * (counts["total"] - counts["frozen"]) + _BYTES_A_FROZEN * counts["frozen"]
    frozen = f", {count(counts['frozen'])} of them frozen" if counts["frozen"] else ""
    return size, f"{count(counts['total'])} parameters{frozen}"


def _count_parameters(recipe: Recipe) -> dict[str, int]:
    """Asked of another process: this one must work where torch is not installed."""
    program = "import json, sys; from megamm.config import from_dict; from megamm.train.recipes import recipe_parameters; "
    program += "print(json.dumps(recipe_parameters(from_dict(json.load(sys.stdin)))))"
    command, text = [sys.executable, "-c", program], canonical_json(to_dict(recipe))
    answer = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=_COUNT_SECONDS)
    return json.loads(answer.stdout.splitlines()[-1])


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    return said.strip().splitlines()[-1] if said.strip() else type(error).__name__


def _held_bytes(checkpoints: Path) -> int:
    """What checkpoints take already: retention gives it back."""
    if not checkpoints.is_dir():
        return 0
    return sum(path.stat().st_size for path in checkpoints.glob("step_*/*") if path.is_file())
