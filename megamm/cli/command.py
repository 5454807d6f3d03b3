"""What a subcommand is, and the arguments that several of them take."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megamm.core.errors import MegaMMError

if TYPE_CHECKING:
    from megamm.config import Recipe

Arguments = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its words after `megamm`, one line of help, how it parses and what it calls.

    Attributes:
        takes_overrides: Words that it does not know override keys of a recipe.
        takes_words: Words that it does not know are for another command.
        takes_files: It ends in any number of files, which may also stand behind options.
    """

    words: tuple[str, ...]
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Arguments], None]
    takes_overrides: bool = False
    takes_words: bool = False
    takes_files: bool = False


def recipe_argument(parser: argparse.ArgumentParser) -> None:
    """RECIPE."""
    parser.add_argument("recipe", help="name of a shipped recipe (see `megamm recipes`) or a TOML file")


def load(arguments: Arguments) -> Recipe:
    """The recipe that is named, with the command's overrides."""
    from megamm.config import load_recipe

    with same_on_all_ranks():
        return load_recipe(arguments.recipe, arguments.overrides)


@contextlib.contextmanager
def same_on_all_ranks():
    """Errors inside come from the command's words and shared files alone: every rank raises them, and one prints them."""
    try:
        yield
    except MegaMMError as error:
        error.on_all_ranks = True
        raise


def count(word: str) -> int:
    """Type of an argument that counts something; argparse makes its error the command's."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def sidecars_argument(parser: argparse.ArgumentParser) -> None:
    """--sidecars DIR."""
    text = "folder for the indexes of URLs (default: data/sidecars)"
    parser.add_argument("--sidecars", type=Path, default=Path("data/sidecars"), metavar="DIR", help=text)


def run_argument(parser: argparse.ArgumentParser) -> None:
    """RUN."""
    parser.add_argument("run", type=Path, help="run folder")


def source_argument(parser: argparse.ArgumentParser) -> None:
    """SOURCE."""
    parser.add_argument("source", type=Path, help="run folder (its newest good checkpoint), one of its checkpoints, or exported folder")
