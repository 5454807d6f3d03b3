"""Which options a job will have: the command line before the environment before the script's directives, as sbatch takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamm.core.errors import ConfigError

# Option -> its short form and the variable that sbatch reads for it (not every option has one).
_NAMES = {
    "array": ("-a", "SBATCH_ARRAY_INX"),
    "nodes": ("-N", ""),
    "ntasks": ("-n", ""),
    "ntasks-per-node": ("", ""),
    "gpus-per-node": ("", "SBATCH_GPUS_PER_NODE"),
    "dependency": ("-d", ""),
    "export": ("", "SBATCH_EXPORT"),
    "job-name": ("-J", "SBATCH_JOB_NAME"),
    "output": ("-o", "SBATCH_OUTPUT"),
}
_MAX_NODES = 1 << 17


def option_in(words: Sequence[str], name: str) -> str | None:
    """The last value that words of a command line give an option, long or short; None where they do not name it."""
    short, _ = _NAMES[name]
    value = None
    for place, word in enumerate(words):
        if word in (f"--{name}", short):
            value = words[place + 1] if place + 1 < len(words) else ""
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        elif short and word.startswith(short) and not word.startswith("--"):
            value = word.removeprefix(short).removeprefix("=")
    return value


@dataclass(frozen=True)
class Options:
    """Where options come from.

    Attributes:
        words: Of sbatch's command line.
        environment: Of sbatch.
        directives: Of the script.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]
    directives: tuple[str, ...]

    def get(self, name: str) -> str | None:
        """The value that an option will have."""
        given = option_in(self.words, name)
        if given is None and (variable := _NAMES[name][1]):
            given = self.environment.get(variable)
        return option_in(self.directives, name) if given is None else given

    @property
    def num_nodes(self) -> tuple[int, int]:
        """Fewest and most nodes.

        Raises:
            ConfigError: `--nodes` is not a number or a range.
        """
        text = self.get("nodes") or "1"
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if match is None or not 0 < int(match[1]) <= int(match[2] or match[1]) <= _MAX_NODES:
            raise ConfigError(f"--nodes={text} is not a number of nodes; give --nodes 16, or a range such as 8-16")
        return int(match[1]), int(match[2] or match[1])

    @property
    def num_gpus_a_node(self) -> int:
        """GPUs a node; 0 where none are asked for.

        Raises:
            ConfigError: It is not a number, with or without a type before it.
        """
        text = self.get("gpus-per-node") or "0"
        if not (number := text.rpartition(":")[2]).isdecimal():
            raise ConfigError(f"--gpus-per-node={text} is not a number of GPUs; give --gpus-per-node 8, or a type and a number: a100:8")
        return int(number)

    @property
    def num_tasks_a_node(self) -> int:
        """Tasks a node, each a rank: one a GPU unless somebody says otherwise.

        Raises:
            ConfigError: It is not a number.
        """
        text = self.get("ntasks-per-node") or str(self.num_gpus_a_node or 1)
        if not text.isdecimal() or not int(text):
            raise ConfigError(f"--ntasks-per-node={text} is not a number of tasks; one task is a rank, give one a GPU")
        return int(text)
