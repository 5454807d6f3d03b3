"""`megamm recipes`, `megamm pretrain`, `megamm finetune`, `megamm preflight`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megamm.cli.command import Arguments, count, load, recipe_argument, same_on_all_ranks
from megamm.core.errors import ConfigError


def pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_argument(parser)
    parser.add_argument("--run", type=Path, default=None, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--resume", default="auto", help="`auto` (default), `never`, or a checkpoint folder that must be used")
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="keep these samples out from here on: one dataset/key a line")
    parser.add_argument("--accept-data-change", action="store_true", help="go on although the data changed since the checkpoint")
    parser.add_argument("--skip-steps", type=_steps, metavar="FIRST-LAST", help="leave out the data that these steps would train on")
    parser.add_argument(
        "--rewind-on-spike", action="store_true", help="after a spike of the loss go back to a checkpoint and leave the data since out"
    )
    parser.add_argument(
        "--stop-after", type=count, default=0, metavar="STEP", help="stop after this step with a checkpoint (a later start goes on from it)"
    )
    parser.add_argument(
        "--max-seconds", type=count, default=0, metavar="N", help="stop after so long with a checkpoint (a later start goes on from it)"
    )


def pretrain(arguments: Arguments) -> None:
    _train(arguments, source=None)


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run, checkpoint or exported folder whose weights the run starts from")
    parser.add_argument(
        "--head",
        choices=("linear", "detector", "segmenter", "ctc", "masked"),
        help="train a head that answers in place of tokens; --model.head.labels=[…] says what it can answer",
    )
    pretrain_arguments(parser)


def finetune(arguments: Arguments) -> None:
    if arguments.head is not None:
        arguments.overrides.append(f"--model.head.kind={arguments.head}")
    _train(arguments, source=arguments.source)


def _train(arguments: Arguments, source: Path | None) -> None:
    from megamm.config import resumed_recipe
    from megamm.train.interruption import StopRequest

    if arguments.rewind_on_spike:
        arguments.overrides.append("--spike.rewind=true")
    recipe = load(arguments)
    folder = arguments.run or Path("runs") / recipe.name
    with same_on_all_ranks():
        recipe = resumed_recipe(folder / "config.json", recipe, arguments.overrides)
    # Before the slow imports: a signal that comes meanwhile must not kill the rank.
    with StopRequest(folder / "STOP", max_seconds=arguments.max_seconds, stop_after=arguments.stop_after) as stop:
        from megamm.train.data import DataChanges
        from megamm.train.pretrain import pretrain

        changes = DataChanges(exclude=arguments.exclude, accept=arguments.accept_data_change, leave_out=arguments.skip_steps)
        pretrain(recipe, folder, resume=arguments.resume, changes=changes, stop=stop, source=source)


def preflight_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_argument(parser)
    parser.add_argument("--run", type=Path, default=None, help="run folder, whose file system is measured (default: runs/RECIPE)")
    parser.add_argument("--output", type=Path, default=Path("preflight.json"), metavar="FILE", help="report (default: preflight.json)")


def preflight(arguments: Arguments) -> None:
    from megamm.core.env import rank_info
    from megamm.preflight.run import preflight, raise_if_bad

    recipe = load(arguments)
    verdict = preflight(recipe, arguments.run or Path("runs") / recipe.name, rank_info(), arguments.output)
    raise_if_bad(verdict, arguments.output)


def _steps(word: str) -> tuple[int, int]:
    first, dash, last = word.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{word!r} is not FIRST-LAST, such as 41-49")
    return int(first), int(last)


def recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="count the parameters of this one alone, overrides applied, as JSON")


def recipes(arguments: Arguments) -> None:
    from megamm.train.recipes import recipe_parameters, recipe_table

    if arguments.recipe is None and arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]!r} overrides a recipe, but none is named")
    print(recipe_table() if arguments.recipe is None else json.dumps(recipe_parameters(load(arguments)), indent=2))
