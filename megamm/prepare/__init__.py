"""Writers of shards: one file a kind of raw source. Imports no models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megamm.prepare import digits, text, words
from megamm.prepare.tokenizer import make_tokenizer, texts
from megamm.prepare.writer import Shard

SOURCES: dict[str, Callable[[Path, int], list[Shard]]] = {
    "digits": digits.prepare,
    "text": text.prepare,
    "words": words.prepare,
}
"""Name of a source -> a function of an output folder and a seed that writes its shards."""

__all__ = ["SOURCES", "Shard", "make_tokenizer", "texts"]
