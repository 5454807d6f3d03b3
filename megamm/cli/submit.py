"""`megamm submit`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from megamm.cli.command import Arguments
from megamm.core.errors import ConfigError

# What is said here to sbatch: destination -> its option.
_SBATCH = {"nodes": "--nodes", "gpus_per_node": "--gpus-per-node", "time": "--time", "partition": "--partition", "account": "--account"}


def arguments(parser: argparse.ArgumentParser) -> None:
    from megamm.submit.job import SCRIPTS
    from megamm.submit.targets import TARGETS

    parser.add_argument("target", choices=tuple(TARGETS), help="the scheduler")
    parser.add_argument(
        "script", choices=tuple(SCRIPTS), metavar="SCRIPT", help=f"what to run, with its own words after it: {', '.join(SCRIPTS)}"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print what would run; submit and write nothing")
    parser.add_argument("--nodes", metavar="N", help="nodes (default: the script's)")
    parser.add_argument("--gpus-per-node", metavar="G", help="GPUs a node, one rank each (default: the site's or the script's)")
    parser.add_argument("--time", metavar="LIMIT", help="time limit of the job; a run goes on in the next one")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTIONS", help="further options of sbatch: --sbatch=--qos=high")


def submit(arguments: Arguments) -> None:
    from megamm.cli.program import parse
    from megamm.submit.job import SCRIPTS, TRAINING, Request
    from megamm.submit.targets import TARGETS

    # As the job will parse them, so that a mistake is found here.
    words = arguments.overrides
    command, said = parse([*SCRIPTS[arguments.script].words, *words])
    recipe, source = getattr(said, "recipe", None), getattr(said, "source", None)
    trains = arguments.script in TRAINING
    first = [str(word) for word in ((source, recipe) if trains else (recipe,)) if word is not None]
    if words[: len(first)] != first:
        raise ConfigError(
            f"{' '.join(first)} comes first, as slurm/{arguments.script}.sh takes it: "
            f"megamm submit slurm {arguments.script} {' '.join(first)} …"
        )
    overrides = said.overrides if command.takes_overrides else []
    sbatch = [f"{option}={value}" for name, option in _SBATCH.items() if (value := getattr(arguments, name)) is not None]
    run = getattr(said, "run", None) or (None if trains else source)
    request = Request(
        command=arguments.script,
        recipe=recipe,
        run=run if arguments.script != "prepare" else None,
        arguments=tuple(own_words(words[len(first) :], overrides, without_run=trains)),
        overrides=tuple(overrides),
        sbatch=(*sbatch, *(word for text in arguments.sbatch for word in shlex.split(text))),
        source=first[0] if trains and source is not None else None,
        output=getattr(said, "output", None),
        resume=getattr(said, "resume", "auto"),
        data_may_change=getattr(said, "accept_data_change", False),
    )
    for line in TARGETS[arguments.target](request, dry_run=arguments.dry_run):
        print(line, flush=True)


def own_words(words: Sequence[str], overrides: Sequence[str], *, without_run: bool) -> list[str]:
    """What is left of a command's words without those that override the recipe, and on request without its `--run`."""
    left, own = list(overrides), []
    for word in words:
        if left and word == left[0]:
            del left[0]
        else:
            own.append(word)
    if without_run:
        values = {place + 1 for place, word in enumerate(own) if word == "--run"}
        own = [word for place, word in enumerate(own) if place not in values and word.partition("=")[0] != "--run"]
    return own
