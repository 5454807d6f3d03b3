"""Pictured and spoken digits in pairs: questions that neither the picture nor the sound answers alone."""

from __future__ import annotations

import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.shared_tables import Command, digit_pictures, jsonl, official_split


def digit_matching(data: Path, scratch: Path) -> Iterator[Command]:
    """Is the spoken digit the pictured one? Half of the answers to each pictured digit are yes, and the other digits share the rest."""
    rows = _pairs(data, scratch, lambda digit, turn: digit if turn % 2 else (digit + 1 + turn // 2 % 9) % 10)
    answered = [{**row, "answer": "yes" if row["pictured"] == row["spoken"] else "no"} for row in rows]
    yield _command(scratch, answered, "matching", "Is the spoken digit the pictured one?")


def digit_sums(data: Path, scratch: Path) -> Iterator[Command]:
    """What do they add up to? Each pictured digit meets all spoken ones alike, so that one of them leaves ten answers open."""
    rows = _pairs(data, scratch, lambda digit, turn: turn % 10)
    answered = [{**row, "answer": str(row["pictured"] + row["spoken"])} for row in rows]
    yield _command(scratch, answered, "question_answering", "What is the sum of the pictured and the spoken digit?")


def _pairs(data: Path, scratch: Path, spoken: Callable[[int, int], int]) -> list[dict[str, Any]]:
    """A row for each picture of mnist12k, with a take from fsdd beside it.

    Splits are those of both sets, so that neither a picture nor a take stands on two sides (speakers do: the official test has all six).

    Args:
        data: The folder of mnist12k.
        scratch: Where the media go.
        spoken: The spoken digit for a pictured one and its turn among its like.
    """
    sounds = data.parent / "fsdd"
    if not sounds.is_dir():
        sys.exit(f"MEGAMM_DATA={data.parent} has no folder fsdd; point it at the folder of the real test data")
    takes: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for path in sorted(sounds.glob("*.flac")):
        digit, _, take = path.stem.split("_")
        takes[official_split(int(take)), int(digit)].append(path)
        shutil.copyfile(path, scratch / path.name)
    order = random.Random(0)
    next_take = {place: cycle(order.sample(found, len(found))) for place, found in sorted(takes.items())}
    turns: Counter[tuple[str, int]] = Counter()
    rows = []
    for split, found in digit_pictures(data, scratch).items():
        for name, digit in found:
            said = spoken(digit, turns[split, digit])
            turns[split, digit] += 1
            take = next(next_take[split, said])
            about = {"pictured": digit, "spoken": said, "speaker": take.stem.split("_")[1]}
            rows.append({"image": name, "audio": take.name, "split": split, "key": name.removesuffix(".png"), **about})
    return rows


def _command(scratch: Path, rows: list[dict[str, Any]], task: str, prompt: str) -> Command:
    # The answer stands in the metadata as well, where a recipe's mapping finds it that shows the picture or the sound alone.
    keep = [word for name in ("pictured", "spoken", "speaker", "result") for word in ("--map", f"{name}=metadata")]
    table = jsonl(scratch / "pairs.jsonl", [{**row, "result": row["answer"]} for row in rows])
    return ["manifest", table, "--task", task, "--prompt", prompt, *keep]
