"""The code and the settings of a submission, kept in the run folder (in `jobs/snapshots` for what trains none): a checkout that is
edited later changes no job that waits.

RUN/submissions/0001/megamm slurm launchers ds_configs   what the job runs (its MEGAMM_HOME)
RUN/submissions/0001/recipe.toml                         the recipe, where it is a file of somebody's own
RUN/submissions/0001/config.json                         the recipe with all overrides
RUN/submissions/0001/code.patch                          how the code differs from its commit, where it does
RUN/submissions/0001/submission.json                     the job's number, its command line, the commit
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megamm.config import recipe_names, to_dict
from megamm.core.errors import ConfigError
from megamm.core.files import write_json, write_text
from megamm.submit.job import Plan

PARTS = ("megamm", "slurm", "launchers", "ds_configs")
"""Folders of a checkout that a job needs."""
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")


@dataclass(frozen=True, slots=True)
class Commit:
    """Which version of the code a checkout holds.

    Attributes:
        name: Of the commit; empty where there is none.
        patch: How tracked files of the code differ from it.
        is_modified: Whether anything differs, files that are not tracked included.
    """

    name: str = ""
    patch: str = ""
    is_modified: bool = False


def commit_of(home: Path) -> Commit:
    """The commit of a checkout and what was changed since; an empty one where git knows nothing of it."""
    name = _git(home, "rev-parse", "HEAD").strip()
    if not name:
        return Commit()
    patch = _git(home, "diff", "--binary", "HEAD", "--", *PARTS)
    new = _git(home, "ls-files", "--others", "--exclude-standard", "--", *PARTS)
    return Commit(name, patch, bool(patch or new.strip()))


def next_folder(folder: Path) -> Path:
    """Where the next submission will be kept among those in `folder`."""
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return folder / f"{max(numbers, default=0) + 1:04d}"


def recipe_word(plan: Plan, folder: Path) -> str | None:
    """The recipe as a job of the snapshot in `folder` is told it; None where it takes none."""
    return str(folder / "recipe.toml") if _own_recipe(plan) else plan.request.recipe


def take_snapshot(plan: Plan, folder: Path) -> Commit:
    """Fill `folder`, which appears whole or not at all.

    Raises:
        ConfigError: Somebody submitted the same run at the same moment.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    commit = commit_of(plan.home)
    try:
        for part in PARTS:
            shutil.copytree(plan.home / part, draft / part, ignore=_LEFT_OUT)
        if plan.site is not None:
            shutil.copyfile(plan.site, draft / "slurm" / "site.env")
        if (recipe := _own_recipe(plan)) is not None:
            shutil.copyfile(recipe, draft / "recipe.toml")
        if commit.patch:
            write_text(draft / "code.patch", commit.patch)
        if plan.recipe is not None:
            write_json(draft / "config.json", to_dict(plan.recipe))
        _rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return commit


def _rename(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise ConfigError(f"{folder} was made by another submission at this moment; submit again") from None


def _own_recipe(plan: Plan) -> str | None:
    """The recipe's file, where it is somebody's own."""
    name = plan.request.recipe
    # As `load_recipe` decides: a file of that name comes before a recipe of that name.
    return None if name is None or (name in recipe_names() and not Path(name).is_file()) else name


def _git(home: Path, *words: str) -> str:
    try:
        answer = subprocess.run(["git", "-C", str(home), *words], capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.decode(errors="surrogateescape") if answer.returncode == 0 else ""
