"""From the words of a command line to one function's end, and its exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from megamm import __version__
from megamm.cli.command import Arguments, Command
from megamm.cli.table import COMMANDS, GROUP_HELP
from megamm.core import env
from megamm.core.errors import ConfigError, MegaMMError
from megamm.core.names import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 when it worked, 2 for words that do not parse, 1 for everything else. Errors are one line unless `--debug` is given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        env.apply_defaults()
        command, arguments = parse(words)
        command.run(arguments)
    except MegaMMError as error:
        if debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.on_all_ranks:
            who, note = "" if rank == "0" else f" (rank {rank})", " [may pass]" if error.may_pass else ""
            print(f"megamm{who}: {error}{note}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megamm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (a pager, head) is gone; nothing more to say to it.
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"megamm: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def run() -> NoReturn:
    """The program `megamm`: `main`, then the end of this process with its exit code."""
    code: int | str | None = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
    # Set by a launcher, or by whatever joined a group of one.
    if "RANK" in os.environ:
        env.leave_at_once(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the words in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megamm: {message}; see `{self.prog} --help`\n")


def parse(words: Sequence[str]) -> tuple[Command, Arguments]:
    """The subcommand that words name, and its arguments; `overrides` holds the words that it does not know.

    Raises:
        ConfigError: A word is none of the command's.
        SystemExit: The words do not parse; it is said on standard error.
    """
    parser = _Parser(prog="megamm", description="Train vision-audio-language models at scale.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"megamm {__version__}")
    groups: dict[tuple[str, ...], Any] = {(): parser.add_subparsers(metavar="COMMAND", required=True)}
    parsers: dict[tuple[str, ...], _Parser] = {}
    for command in COMMANDS:
        *group, name = command.words
        if tuple(group) not in groups:
            between = groups[()].add_parser(group[0], help=GROUP_HELP[group[0]], allow_abbrev=False)
            groups[tuple(group)] = between.add_subparsers(metavar="COMMAND", required=True)
        more = " RECIPE keys can be overridden: --optim.lr 3e-4" if command.takes_overrides else ""
        one = groups[tuple(group)].add_parser(name, help=command.help, description=command.help + more, allow_abbrev=False)
        if tuple(words[: len(command.words)]) == command.words:
            # Of the command that is called alone: the others' arguments may need imports.
            command.arguments(one)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        one.set_defaults(command=command)
        parsers[command.words] = one
    arguments, rest = parser.parse_known_args(words)
    command = arguments.command
    if rest and command.takes_files:
        # Files behind options: an argument of any number has taken none of them by then.
        arguments, rest = parsers[command.words].parse_known_intermixed_args(words[len(command.words) :])
    if rest and not (command.takes_overrides or command.takes_words):
        raise ConfigError(f"{rest[0]!r} is not an argument of `megamm {' '.join(command.words)}`; see its --help")
    if command.takes_overrides:
        _check_undotted(arguments, rest)
    arguments.overrides = rest
    return command, arguments


def _check_undotted(arguments: Arguments, overrides: Sequence[str]) -> None:
    """A word such as `--exlude` is an option that is misspelt rather than a key of a recipe."""
    undotted = [word[2:].partition("=")[0] for word in overrides if word.startswith("--") and "." not in word.partition("=")[0]]
    if not undotted:
        return
    from megamm.config import Recipe

    keys = {field.name for field in fields(Recipe)}
    options = [name.replace("_", "-") for name in vars(arguments)]
    for name in undotted:
        if name not in keys:
            called = f"megamm {' '.join(arguments.command.words)}"
            raise ConfigError(
                f"--{name} is no option of `{called}`{did_you_mean(name, options)}; keys of a recipe are written --optim.lr 3e-4"
            )
