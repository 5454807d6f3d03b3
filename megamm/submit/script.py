"""A batch script as sbatch reads it: its directives, and what is wrong with them that `sbatch --test-only` does not say."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_DIRECTIVE = "#SBATCH"


def directives(script: Path) -> list[str]:
    """The words of all directives that sbatch obeys: those before the first command."""
    words: list[str] = []
    for line in script.read_text(encoding="utf-8").splitlines():
        if _is_command(line):
            break
        if line.startswith(_DIRECTIVE):
            words += shlex.split(line.removeprefix(_DIRECTIVE), comments=True)
    return words


def directive_problems(script: Path) -> Iterator[str]:
    """Directives that sbatch passes over without a word, each with its line."""
    first_command = 0
    for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), start=1):
        if first_command and line.startswith(_DIRECTIVE):
            yield f"{script}:{number}: sbatch ignores {line.strip()!r}, it comes after the first command (line {first_command}); move it up"
        if not first_command and _is_command(line):
            first_command = number


def syntax_problems(scripts: Sequence[Path]) -> Iterator[str]:
    """What `bash -n` says of each script."""
    for script in scripts:
        answer = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        if answer.returncode:
            yield answer.stderr.strip().splitlines()[0]


def _is_command(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")
