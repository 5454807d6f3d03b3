"""What a submission comes to, before anything is checked, written or submitted."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import megamm
from megamm.config import Recipe, load_recipe, resumed_recipe
from megamm.core.errors import ConfigError
from megamm.status.submissions import FOLDER
from megamm.submit.options import Options, option_in
from megamm.submit.script import directives
from megamm.submit.site import site_environment, site_file


@dataclass(frozen=True, slots=True)
class Script:
    """A batch script of `slurm/`, and what is looked at before it is submitted.

    Attributes:
        words: The command of `megamm` that its arguments go to.
        checks: Names of `checks.CHECKS`, in the order in which they are told.
    """

    words: tuple[str, ...]
    checks: tuple[str, ...]


SCRIPTS = {
    "prepare": Script(("prepare",), ("scripts", "parts", "output", "slurm")),
    "tokenize": Script(("tokenizer",), ("scripts", "shards", "slurm")),
    "preflight": Script(("preflight",), ("scripts", "ranks", "slurm")),
    "pretrain": Script(("pretrain",), ("scripts", "ranks", "run", "data", "space", "slurm")),
    "finetune": Script(("finetune",), ("scripts", "ranks", "run", "data", "space", "slurm")),
    "evaluate": Script(("evaluate",), ("scripts", "model", "slurm")),
    "export": Script(("export",), ("scripts", "model", "output", "slurm")),
}
"""Name of what can be submitted, which is its script's as well."""
TRAINING = ("pretrain", "finetune")
"""Those that train a run."""
JOBS = Path("jobs")
"""Where submissions and logs of what belongs to no run are kept, below the working folder."""


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

    Attributes:
        command: One of `SCRIPTS`.
        recipe: Name of a shipped recipe, or a TOML file; None where the command takes none.
        run: The run folder that is trained in, evaluated or exported; None for `runs/NAME`, or where there is none.
        arguments: Further words of the command, as somebody said them.
        overrides: Words that override the recipe.
        sbatch: Options of sbatch; they win over the site's and the script's.
        source: What a finetuned run starts from, as somebody said it.
        output: The folder that the command makes, where it is told one.
        resume: What the command is told to resume.
        data_may_change: Whether the command is told to accept changed data.
    """

    command: str
    recipe: str | None
    run: Path | None
    arguments: tuple[str, ...]
    overrides: tuple[str, ...]
    sbatch: tuple[str, ...]
    source: str | None = None
    output: Path | None = None
    resume: str = "auto"
    data_may_change: bool = False

    @property
    def trains(self) -> bool:
        """Whether it is a run that is submitted, and not something before or after one."""
        return self.command in TRAINING


@dataclass(frozen=True)
class Plan:
    """A job as it would be submitted.

    Attributes:
        request: What was asked for.
        recipe: With overrides, and as the archive has it of a run that exists; None where the command takes none.
        stated: Without overrides: the recipe, or the run's archive.
        run: The run folder, absolute; None where there is none.
        folder: Where snapshot and output of the job are kept: the run that is trained, else `JOBS`.
        home: The checkout that is snapshotted.
        site: The site's settings; None where there are none.
        site_environment: What they set.
        options: Of the job.
    """

    request: Request
    recipe: Recipe | None
    stated: Recipe | None
    run: Path | None
    folder: Path
    home: Path
    site: Path | None
    site_environment: dict[str, str]
    options: Options

    @property
    def script(self) -> Path:
        """The batch script, in the checkout."""
        return _script(self.home, self.request.command)

    @property
    def snapshots(self) -> Path:
        """Where its submissions are kept, by number: a folder with `submissions` is a run to `megamm status`, others must not be."""
        return self.folder / (FOLDER if self.request.trains else "snapshots")

    @property
    def trained(self) -> tuple[Recipe, Path]:
        """Recipe and folder of the run that is trained."""
        assert self.recipe is not None and self.run is not None, f"{self.request.command} has a recipe and a run"
        return self.recipe, self.run

    @property
    def world_sizes(self) -> range:
        """Ranks on the fewest to the most nodes."""
        fewest, most = self.options.num_nodes
        tasks = self.options.num_tasks_a_node
        return range(fewest * tasks, most * tasks + 1, tasks)

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that the job needs to run the code in `home`, besides what it inherits."""
        own = {"MEGAMM_HOME": str(home)}
        if self.site is not None:
            own["MEGAMM_SITE"] = str(home / "slurm" / "site.env")
        if not {"MEGAMM_VENV", "MEGAMM_CONTAINER"} & self.options.environment.keys():
            # The snapshot holds no virtual environment; this process's has what the code needs. A container has its own.
            own["MEGAMM_VENV"] = sys.prefix
        return {**self.site_environment, **own}

    def command(self, home: Path, recipe: str | None, *, test: bool = False) -> list[str]:
        """The command line of sbatch for the code in `home`.

        Args:
            home: The snapshot, or the checkout.
            recipe: Name of a shipped recipe, or the file that will be read.
            test: Only ask whether it could run.
        """
        how = "--test-only" if test else "--parsable"
        words = [word for word in (self.request.source, recipe) if word is not None]
        # The script works it out from its own folder elsewhere.
        words += ["--run", str(self.run)] if self.request.trains else []
        script = str(_script(home, self.request.command))
        return ["sbatch", how, *self.options.words, script, *words, *self.request.arguments, *self.request.overrides]


def plan_job(request: Request) -> Plan:
    """Work out what a request comes to.

    Raises:
        ConfigError: The recipe, an option or the site's settings are not valid, or there are no scripts.
    """
    home = Path(megamm.__file__).resolve().parents[1]
    if not (script := _script(home, request.command)).is_file():
        raise ConfigError(f"{script} does not exist: this megamm is installed without its scripts; submit from a checkout")
    recipe, stated, run = _recipes(request)
    folder = run if run is not None and request.trains else JOBS.absolute()
    site = site_file(home)
    environment = site_environment(site)
    own = Options(request.sbatch, {**os.environ, **environment}, tuple(directives(script)))
    name = folder.name if request.trains else request.command
    words = _own_words(own, folder / "logs", name, environment)
    return Plan(
        request=request,
        recipe=recipe,
        stated=stated,
        run=run,
        folder=folder,
        home=home,
        site=site,
        site_environment=environment,
        options=Options((*words, *request.sbatch), own.environment, own.directives),
    )


def _script(home: Path, command: str) -> Path:
    return home / "slurm" / f"{command}.sh"


def _recipes(request: Request) -> tuple[Recipe | None, Recipe | None, Path | None]:
    """The recipe with overrides and without them, and the run folder."""
    run = request.run.absolute() if request.run else None
    if request.recipe is None:
        return None, None, run
    recipe, stated = load_recipe(request.recipe, request.overrides), load_recipe(request.recipe)
    if not request.trains:
        return recipe, stated, run
    run = run or (Path("runs") / recipe.name).absolute()
    archived = run / "config.json"
    return resumed_recipe(archived, recipe, request.overrides), resumed_recipe(archived, stated, ()), run


def _own_words(options: Options, logs: Path, name: str, site: dict[str, str]) -> list[str]:
    """Options that follow from others; what somebody says comes after them and wins."""
    words = []
    if option_in(options.words, "job-name") is None:
        words.append(f"--job-name={name}")
    if option_in(options.words, "output") is None:
        # Percent signs are patterns to sbatch.
        words.append(f"--output={str(logs).replace('%', '%%')}/job-{'%A_%a' if options.get('array') else '%j'}.out")
    exported = options.get("export")
    if exported is not None and "ALL" not in exported.split(","):
        # The site lets no variables through but those that are named.
        named = [] if exported in ("NONE", "NIL") else [exported]
        words.append(f"--export={','.join([*named, 'MEGAMM_HOME', 'MEGAMM_VENV', 'MEGAMM_SITE', *site])}")
    return words
