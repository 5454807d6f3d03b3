"""A job handed to Slurm: told what would happen, checked, snapshotted, submitted, recorded."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megamm.config import Recipe, to_dict
from megamm.core.errors import ConfigError
from megamm.core.files import write_json
from megamm.status.submissions import FILE, Submission
from megamm.status.units import several
from megamm.submit.checks import check
from megamm.submit.job import Plan, Request, plan_job
from megamm.submit.snapshot import Commit, commit_of, next_folder, recipe_word, take_snapshot
from megamm.train.run_folder import differences

_TIMEOUT_SECONDS = 120.0


def submit(request: Request, *, dry_run: bool) -> Iterator[str]:
    """Check a request and submit it; with `dry_run` say what would run, and write nothing.

    Yields:
        Lines for a person, as they come.

    Raises:
        ConfigError: It cannot be planned, a check found a problem, or sbatch refused it.
    """
    plan = plan_job(request)
    num_problems = 0
    for name, finding in check(plan):
        num_problems += finding.level == "problem"
        yield f"{finding.level:<8} {name:<8} {finding.text}"
    folder = next_folder(plan.snapshots)
    if dry_run:
        yield from _rehearsal(plan, folder)
    if num_problems:
        raise ConfigError(f"nothing was submitted: {several(num_problems, 'problem')} (see above)")
    if dry_run:
        return
    submission = _submit(plan, folder)
    yield ""
    yield f"submitted job {submission.job_id}: {_subject(plan)}, code and settings in {folder}"
    yield from _next_steps(plan, submission)


def _rehearsal(plan: Plan, folder: Path) -> Iterator[str]:
    """What would run, to the letter."""
    commit = commit_of(plan.home)
    yield ""
    yield f"code       {plan.home}, commit {commit.name or 'unknown'}{', modified' if commit.is_modified else ''}"
    yield f"snapshot   {folder}"
    if plan.recipe is not None and plan.stated is not None:
        is_run = plan.request.trains and (plan.folder / "config.json").is_file()
        yield f"settings that differ from {'those of the run' if is_run else 'the recipe'}"
        changed = [f"  {line}" for line in _changes(plan.stated, plan.recipe)]
        yield from changed or ["  none"]
    yield "environment"
    yield from (f"  {name}={shlex.quote(value)}" for name, value in sorted(plan.environment(folder).items()))
    yield "command"
    yield f"  {shlex.join(plan.command(folder, recipe_word(plan, folder)))}"
    yield "nothing was submitted and nothing written (--dry-run)"


def _changes(stated: Recipe, recipe: Recipe) -> Iterator[str]:
    old, new = to_dict(stated), to_dict(recipe)
    for key in differences(old, new):
        yield f"{key}: {_at(old, key)} -> {_at(new, key)}"


def _at(table: Any, key: str) -> str:
    for name in key.split("."):
        table = table.get(name) if isinstance(table, dict) else None
    return "nothing" if table is None else str(table)


def _submit(plan: Plan, folder: Path) -> Submission:
    logs = plan.folder / "logs"
    with contextlib.ExitStack() as undo:
        for path in (*reversed(plan.folder.parents), plan.folder, logs, folder.parent):
            if not path.exists():
                undo.callback(_remove_if_empty, path)
        # Slurm opens the job's output before its first command, and makes no folder for it.
        logs.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(exist_ok=True)
        commit = take_snapshot(plan, folder)
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        submission = _record(plan, folder, commit)
        write_json(folder / FILE, asdict(submission))
        try:
            job_id = _sbatch(submission)
        except subprocess.TimeoutExpired:
            undo.pop_all()
            waited = f"sbatch did not answer within {_TIMEOUT_SECONDS:.0f} s and may have taken the job"
            raise ConfigError(f"{waited}: look at `squeue --me`; what it would run is in {folder}") from None
        # From here on there is a job, which needs all of it.
        undo.pop_all()
    submission = replace(submission, job_id=job_id)
    write_json(folder / FILE, asdict(submission))
    return submission


def _record(plan: Plan, folder: Path, commit: Commit) -> Submission:
    return Submission(
        target="slurm",
        job_id="",
        submitted_at=time.strftime("%Y-%m-%d %H:%M:%S"),
        submitted_by=getpass.getuser(),
        command=plan.command(folder, recipe_word(plan, folder)),
        environment=plan.environment(folder),
        num_nodes=plan.options.num_nodes[1],
        num_ranks=plan.world_sizes[-1],
        commit=commit.name,
        is_modified=commit.is_modified,
    )


def _sbatch(submission: Submission) -> str:
    """Submit; the job's number.

    Raises:
        ConfigError: sbatch refused it, or cannot be called.
    """
    environment = {**os.environ, **submission.environment}
    try:
        answer = subprocess.run(submission.command, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS)
    except FileNotFoundError:
        raise ConfigError("sbatch is not on PATH; submit from a node of the cluster") from None
    if answer.returncode:
        raise ConfigError(f"sbatch refused the job: {' '.join(answer.stderr.split())}")
    return answer.stdout.strip().partition(";")[0]


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _next_steps(plan: Plan, submission: Submission) -> Iterator[str]:
    folder = shlex.quote(str(plan.folder))
    if plan.request.trains:
        yield f"  megamm status {folder}"
    yield f"  tail -F {folder}/logs/job-{submission.job_id}{'_0' if plan.options.get('array') else ''}.out"
    if plan.request.trains:
        yield f"  touch {folder}/STOP          ends it after a step, with a checkpoint"
    yield f"  scancel {submission.job_id}"


def _subject(plan: Plan) -> str:
    return str(plan.folder) if plan.request.trains else plan.request.command
