"""The four sets of emoji: names, pictures for names, changes, and what faces feel, by rules over their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared_tables import SKIN_TONES, Command, jsonl

TEST_SHARE = 0.2
"""Of what stands on one side, in each set."""
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


def emoji(data: Path) -> Iterator[dict[str, Any]]:
    """All entries of the emoji: `id`, `name`, `group` (what the data sorts it under) and `keywords`."""
    yield from map(json.loads, (data / "names.jsonl").read_text(encoding="utf-8").splitlines())


def face_feeling(entry: Mapping[str, Any]) -> str:
    """What the face of an entry feels; empty where it feels nothing, or is no face."""
    return feeling(entry["name"]) if entry["group"] in GROUPS else ""


def base_emoji(name: str) -> str:
    """The emoji that a picture is a variant of: its first code point, without skin tone and what is joined to it.

    All its variants stand on one side in every set of emoji: a picture is asked for its name, its feeling and what it turns into, and what
    one set holds out no other may learn from.
    """
    return SKIN_TONES.sub("", name).partition("_200d_")[0]


def noto_emoji48(data: Path, scratch: Path) -> Iterator[Command]:
    """Named pictures; see `base_emoji` for what is held out."""
    yield *_names(data, scratch, "image", "answer"), "--task", "captioning", "--prompt", "What does this picture show?"


def noto_emoji48_pictures(data: Path, scratch: Path) -> Iterator[Command]:
    """The way back: pictures for names."""
    yield *_names(data, scratch, "answer_image", "name"), "--task", "image_generation", "--prompt", "Draw {name}."


def noto_emoji48_edits(data: Path, scratch: Path) -> Iterator[Command]:
    """Pictures to be changed as a text says."""
    sides = {entry["id"]: base_emoji(entry["id"]) for entry in emoji(data)}
    pairs = [line.split("\t") for line in (data / "edit_pairs.tsv").read_text(encoding="utf-8").splitlines()]
    rows = [
        {"image": f"{before}.png", "prompt": text, "answer_image": f"{after}.png", "group": sides[before], "key": f"{before}-{after}"}
        for before, after, text in pairs
    ]
    yield "manifest", jsonl(scratch / "edits.jsonl", rows), "--root", data / "png", "--task", "image_editing", "--test-share", TEST_SHARE


def noto_emoji48_faces(data: Path, scratch: Path) -> Iterator[Command]:
    """Faces and what they feel."""
    rows = [
        {"image": f"{entry['id']}.png", "label": feels, "group": base_emoji(entry["id"]), "key": entry["id"], "name": entry["name"]}
        for entry in emoji(data)
        if (feels := face_feeling(entry))
    ]
    asked = ("--task", "sentiment", "--prompt", "Which feeling does this face show: positive, negative or neutral?")
    shared = ("--map", "name=metadata", "--test-share", TEST_SHARE)
    yield "manifest", jsonl(scratch / "faces.jsonl", rows), "--root", data / "png", *asked, *shared


def _names(data: Path, scratch: Path, picture: str, name: str) -> Command:
    rows = [
        {
            picture: f"{entry['id']}.png",
            name: entry["name"],
            "group": base_emoji(entry["id"]),
            "key": entry["id"],
            "category": entry["group"],
        }
        for entry in emoji(data)
    ]
    shared = ("--map", "category=metadata", "--test-share", TEST_SHARE)
    return "manifest", jsonl(scratch / "names.jsonl", rows), "--root", data / "png", *shared
