"""Writers of shards: one file a kind of raw source under `sources`, and what all of them share. Imports no models.

Importing the table is cheap: what reads media or writes shards is imported by those who do it (`megamm.prepare.run`).
"""

from __future__ import annotations

from megamm.prepare.source import Source
from megamm.prepare.sources import coco, conversations, digit_text, digits, folders, huggingface, interactions, manifest, text, words

_ALL = (
    folders.IMAGES,
    folders.AUDIOS,
    manifest.SOURCE,
    coco.SOURCE,
    text.SOURCE,
    conversations.SOURCE,
    interactions.SOURCE,
    huggingface.SOURCE,
    digits.SOURCE,
    words.SOURCE,
    digit_text.SOURCE,
)

SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
"""Every kind of raw data that `megamm prepare` reads; a new one is one file and one line here."""

__all__ = ["SOURCES", "Source"]
