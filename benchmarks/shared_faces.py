"""What emoji faces feel, by rules over their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.shared_tables import SKIN_TONES, Command, jsonl

GROUPS = ("Smileys & Emotion", "People & Body")
FEELINGS = (
    ("", r"heart(?!-eyes|s)|monkey|horns|with tear$|skull|symbol$"),
    (
        "negative",
        r"angry|enraged|pouting|frowning|\bsad\b|crying|weary|tired|worried|anxious|fear|anguished|disappointed|downcast|pensive"
        r"|confounded|persevering|steam from|symbols|nauseated|vomiting|sneezing|thermometer|bandage|medical|crossed-out|spiral|woozy"
        r"|hot face|cold face|grimacing|unamused|rolling eyes|confused|bags under|facepalming|gesturing NO",
    ),
    (
        "positive",
        r"grinning|beaming|\bjoy\b|smil|winking|savoring|kissing|blowing|with tongue|star-struck|partying|laughing|relieved|cowboy"
        r"|zany|saluting|nerd|gesturing OK|raising hand\b",
    ),
    (
        "neutral",
        r"neutral|expressionless|without mouth|thinking|eyebrow|zipper|shushing|hushed|open mouth|astonished|over mouth|monocle"
        r"|sleeping|sleepy|yawning|diagonal|clouds|dotted|shrugging|head shaking",
    ),
)
"""Feeling and what a name that has it says; the first rule that fits counts, and a name that none fits, or the first one, shows none."""


def feeling(name: str) -> str:
    """The feeling that a name tells of; empty where it tells of none."""
    return next((feeling for feeling, words in FEELINGS if re.search(words, name)), "")


def noto_emoji48_faces(data: Path, scratch: Path) -> Iterator[Command]:
    """Faces and what they feel; a fifth is held out, each with all of its skin tones and genders."""
    entries = [json.loads(line) for line in (data / "names.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {"image": f"{entry['id']}.png", "label": feels, "group": base_emoji(entry["id"]), "key": entry["id"], "name": entry["name"]}
        for entry in entries
        if entry["group"] in GROUPS and (feels := feeling(entry["name"]))
    ]
    asked = ("--task", "sentiment", "--prompt", "Which feeling does this face show: positive, negative or neutral?")
    yield "manifest", jsonl(scratch / "faces.jsonl", rows), "--root", data / "png", *asked, "--map", "name=metadata", "--test-share", 0.2


def base_emoji(name: str) -> str:
    """The emoji that a picture is a variant of: its first code point, without skin tone and what is joined to it."""
    return SKIN_TONES.sub("", name).partition("_200d_")[0]
