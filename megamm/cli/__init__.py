"""The command line: one visible table of subcommands (`table`); each parses its words, then calls one function."""

from megamm.cli.program import main, run
from megamm.cli.table import COMMANDS

__all__ = ["COMMANDS", "main", "run"]
