"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check: `ok`, a `note` that a person should know, or a `problem` that keeps the job from being submitted."""

    level: Level
    text: str


def good(text: str) -> Finding:
    """Something that holds."""
    return Finding("ok", text)


def note(text: str) -> Finding:
    """Something to know."""
    return Finding("note", text)


def problem(text: str) -> Finding:
    """Something that must be mended first."""
    return Finding("problem", text)
