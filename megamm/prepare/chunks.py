"""Cutting long texts where a reader would pause, without overlap and without loss: the chunks of a text joined are the text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
_LINE = re.compile(r"\n")
_SENTENCE = re.compile(r"""[.!?…][)\]"'”’»]*\s+|[。！？][）】》」』”’]*\s*""")
_SPACE = re.compile(r"\s+")
_BORDERS = (_PARAGRAPH, _LINE, _SENTENCE, _SPACE)
_JOINERS = frozenset("\u200d\ufe0e\ufe0f")
_MAX_CLUSTER = 32


def chunks(text: str, max_characters: int) -> Iterator[tuple[int, int]]:
    """Where each chunk of a text begins and ends, in characters.

    Args:
        text: Of any length.
        max_characters: Of a chunk, at least 1.
    """
    begin = 0
    while begin < len(text):
        end = begin + first_chunk(text[begin : begin + max_characters + 1], max_characters)
        yield begin, end
        begin = end


def first_chunk(text: str, max_characters: int) -> int:
    """Characters of the first chunk of a text: all where they fit, else up to the last border of the best kind in the second half.

    Borders are, best first: a blank line, the end of a line, the end of a sentence, white space. A text without any is cut
    where no character falls apart from the accents and joiners that belong to it.

    Args:
        text: The text, or its first `max_characters` + 1 characters.
        max_characters: Of a chunk.
    """
    if len(text) <= max_characters:
        return len(text)
    half = max_characters // 2
    for border in _BORDERS:
        ends = [found.end() for found in border.finditer(text, half, max_characters) if not _belongs_to_previous(text, found.end())]
        if ends:
            return ends[-1]
    cut = max_characters
    for _ in range(min(_MAX_CLUSTER, max_characters - 1)):
        if not _belongs_to_previous(text, cut):
            return cut
        cut -= 1
    return max_characters


def _belongs_to_previous(text: str, at: int) -> bool:
    character, previous = text[at], text[at - 1]
    if previous == "\u200d" or (previous == "\r" and character == "\n"):
        return True
    return character in _JOINERS or unicodedata.combining(character) != 0 or "\U0001f3fb" <= character <= "\U0001f3ff"
