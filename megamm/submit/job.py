"""What a submission comes to, before anything is checked, written or submitted."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import megamm
from megamm.config import Recipe, load_recipe, resumed_recipe
from megamm.core.errors import ConfigError
from megamm.submit.options import Options, option_in
from megamm.submit.script import directives
from megamm.submit.site import site_environment, site_file

_SCRIPTS = {"pretrain": "pretrain.sh"}
COMMANDS = tuple(_SCRIPTS)
"""Commands that can be submitted."""


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

    Attributes:
        command: One of `COMMANDS`.
        recipe: Name of a shipped recipe, or a TOML file.
        run: The run folder; None for `runs/NAME`.
        arguments: Further options of the command, as its own words.
        overrides: Words that override the recipe.
        sbatch: Options of sbatch; they win over the site's and the script's.
        resume: What the command is told to resume.
        data_may_change: Whether the command is told to accept changed data.
    """

    command: str
    recipe: str
    run: Path | None
    arguments: tuple[str, ...]
    overrides: tuple[str, ...]
    sbatch: tuple[str, ...]
    resume: str = "auto"
    data_may_change: bool = False


@dataclass(frozen=True)
class Plan:
    """A job as it would be submitted.

    Attributes:
        request: What was asked for.
        recipe: With overrides, and as the run's archive has it where the run exists.
        stated: Without overrides: the recipe, or the run's archive.
        run: The run folder, absolute.
        home: The checkout that is snapshotted.
        site: The site's settings; None where there are none.
        site_environment: What they set.
        options: Of the job.
    """

    request: Request
    recipe: Recipe
    stated: Recipe
    run: Path
    home: Path
    site: Path | None
    site_environment: dict[str, str]
    options: Options

    @property
    def script(self) -> Path:
        """The batch script, in the checkout."""
        return self.home / "slurm" / _SCRIPTS[self.request.command]

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

    def command(self, home: Path, recipe: str, *, test: bool = False) -> list[str]:
        """The command line of sbatch for the code in `home`.

        Args:
            home: The snapshot, or the checkout.
            recipe: Name of a shipped recipe, or the file that will be read.
            test: Only ask whether it could run.
        """
        how = "--test-only" if test else "--parsable"
        script = home / "slurm" / self.script.name
        words = [recipe, "--run", str(self.run), *self.request.arguments, *self.request.overrides]
        return ["sbatch", how, *self.options.words, str(script), *words]


def plan_job(request: Request) -> Plan:
    """Work out what a request comes to.

    Raises:
        ConfigError: The recipe, an option or the site's settings are not valid, or there are no scripts.
    """
    home = Path(megamm.__file__).resolve().parents[1]
    if not (script := home / "slurm" / _SCRIPTS[request.command]).is_file():
        raise ConfigError(f"{script} does not exist: this megamm is installed without its scripts; submit from a checkout")
    recipe = load_recipe(request.recipe, request.overrides)
    run = (request.run or Path("runs") / recipe.name).absolute()
    archived = run / "config.json"
    site = site_file(home)
    environment = site_environment(site)
    own = Options(request.sbatch, {**os.environ, **environment}, tuple(directives(script)))
    words = _own_words(own, run, recipe.name, environment)
    return Plan(
        request=request,
        recipe=resumed_recipe(archived, recipe, request.overrides),
        stated=resumed_recipe(archived, load_recipe(request.recipe), ()),
        run=run,
        home=home,
        site=site,
        site_environment=environment,
        options=Options((*words, *request.sbatch), own.environment, own.directives),
    )


def _own_words(options: Options, run: Path, name: str, site: dict[str, str]) -> list[str]:
    """Options that follow from others; what somebody says comes after them and wins."""
    words = []
    if option_in(options.words, "job-name") is None:
        words.append(f"--job-name={run.name if run.name != name else name}")
    if option_in(options.words, "output") is None:
        # Percent signs are patterns to sbatch.
        words.append(f"--output={str(run / 'logs').replace('%', '%%')}/job-%j.out")
    exported = options.get("export")
    if exported is not None and "ALL" not in exported.split(","):
        # The site lets no variables through but those that are named.
        named = [] if exported in ("NONE", "NIL") else [exported]
        words.append(f"--export={','.join([*named, 'MEGAMM_HOME', 'MEGAMM_VENV', 'MEGAMM_SITE', *site])}")
    return words
