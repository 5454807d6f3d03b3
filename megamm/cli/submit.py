"""`megamm submit`."""

from __future__ import annotations

import argparse
import shlex

from megamm.cli.command import Arguments
from megamm.cli.training import pretrain_arguments

# What is said here to sbatch: destination -> its option.
_SBATCH = {"nodes": "--nodes", "gpus_per_node": "--gpus-per-node", "time": "--time", "partition": "--partition", "account": "--account"}


def arguments(parser: argparse.ArgumentParser) -> None:
    from megamm.submit.job import COMMANDS
    from megamm.submit.targets import TARGETS

    parser.add_argument("target", choices=tuple(TARGETS), help="the scheduler")
    parser.add_argument("command_name", choices=COMMANDS, metavar="COMMAND", help=f"what to run: {', '.join(COMMANDS)}")
    pretrain_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything and print what would run; submit and write nothing")
    parser.add_argument("--nodes", metavar="N", help="nodes (default: the script's)")
    parser.add_argument("--gpus-per-node", metavar="G", help="GPUs a node, one rank each (default: the site's or the script's)")
    parser.add_argument("--time", metavar="LIMIT", help="time limit of the job; the run goes on in the next one")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTIONS", help="further options of sbatch: --sbatch=--qos=high")


def submit(arguments: Arguments) -> None:
    from megamm.submit.job import Request
    from megamm.submit.targets import TARGETS

    words = [f"{option}={value}" for name, option in _SBATCH.items() if (value := getattr(arguments, name)) is not None]
    request = Request(
        command=arguments.command_name,
        recipe=arguments.recipe,
        run=arguments.run,
        arguments=tuple(words_of_pretrain(arguments)),
        overrides=tuple(arguments.overrides),
        sbatch=(*words, *(word for text in arguments.sbatch for word in shlex.split(text))),
        resume=arguments.resume,
        data_may_change=arguments.accept_data_change,
    )
    for line in TARGETS[arguments.target](request, dry_run=arguments.dry_run):
        print(line, flush=True)


def words_of_pretrain(arguments: Arguments) -> list[str]:
    """Options of `megamm pretrain` that were given, as its own words; recipe and run folder are said apart."""
    parser = argparse.ArgumentParser()
    pretrain_arguments(parser)
    words = []
    for name, default in vars(parser.parse_args([arguments.recipe])).items():
        if name in ("recipe", "run") or (value := getattr(arguments, name)) == default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            # A range is written FIRST-LAST.
            words.append("-".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return words
