"""Commands that the documents and the scripts show are words that their commands take."""

import re
import shlex
from pathlib import Path

import pytest

from megamm.cli.program import parse
from megamm.config import recipe_names
from megamm.submit.job import SCRIPTS

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = (CHECKOUT / "README.md", *sorted(CHECKOUT.glob("docs/*.md")), *sorted(CHECKOUT.glob("slurm/*.sh")))
_EXAMPLE = re.compile(
    r"^(?:#| {4})[^\n]*?(?:sbatch [^\n]*?slurm/(\w+)\.sh|(?:megamm|launchers/)\s?submit slurm (\w+)) ([^`…\[\n]+)$", re.MULTILINE
)


def examples() -> list[tuple[str, str]]:
    """Script and words of each."""
    found = [match.group(1, 2, 3) for path in FILES for match in _EXAMPLE.finditer(path.read_text(encoding="utf-8"))]
    return sorted({(script or submitted, re.sub(r"\s{2,}#.*", "", words).strip()) for script, submitted, words in found})


def test_examples_are_found():
    assert {script for script, _ in examples()} >= set(SCRIPTS)


@pytest.mark.parametrize(("script", "words"), examples(), ids=lambda value: value[:40])
def test_an_example_is_taken_as_it_is_written(script: str, words: str):
    said = [word for word in shlex.split(words) if word != "RECIPE"]
    submitted = ["submit", "slurm", script, *said]
    _, own = parse(submitted)
    command, arguments = parse([*SCRIPTS[script].words, *own.overrides])
    assert not arguments.overrides or command.takes_overrides
    recipe = getattr(arguments, "recipe", None)
    assert recipe is None or recipe in recipe_names() or recipe.endswith(".toml")
