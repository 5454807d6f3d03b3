"""Names in words and messages: lists of them, what somebody meant by one that does not exist, messages that differ in names alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def listed(text: str) -> tuple[str, ...]:
    """Names with commas between them; blanks around a name are no part of it."""
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'NEAREST'?` for an error message, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def kind_of_message(text: str, *names: str) -> str:
    """A message without the given names and without its numbers, so that messages of one kind can be counted together."""
    for name in names:
        text = text.replace(name, "…")
    return _NUMBER.sub("#", text)
