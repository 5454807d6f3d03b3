"""What an answer owes to each part of what was asked, in source coordinates."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megamm.inference.explain.places import Patch, Span, Word
from megamm.inference.explain.question import Answer


@dataclass(frozen=True, slots=True)
class PictureScores:
    """What an answer owes to a picture.

    Attributes:
        file: The picture.
        grid: Rows and columns of patches.
        patches: In reading order.
        pixels: float[h, w], finer scores in the resolution that the model sees; None where a method has none.
    """

    file: Path
    grid: tuple[int, int]
    patches: tuple[Patch, ...]
    pixels: np.ndarray | None = None

    @property
    def total(self) -> float:
        """Of all patches."""
        return sum(one.score for one in self.patches)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        patches = [asdict(one) for one in self.patches]
        return {"file": str(self.file), "rows": self.grid[0], "columns": self.grid[1], "patches": patches, "score": self.total}


@dataclass(frozen=True, slots=True)
class SoundScores:
    """What an answer owes to a sound.

    Attributes:
        file: The sound.
        seconds: Its duration.
        spans: In order.
        mel: float32[M, F], what the model hears.
        cells: float[M, F], the scores of each mel band at each frame; None where a method has none.
    """

    file: Path
    seconds: float
    spans: tuple[Span, ...]
    mel: np.ndarray
    cells: np.ndarray | None = None

    @property
    def total(self) -> float:
        """Of all spans."""
        return sum(one.score for one in self.spans)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        spans = [{"start_seconds": one.start, "stop_seconds": one.stop, "score": one.score} for one in self.spans]
        return {"file": str(self.file), "seconds": self.seconds, "spans": spans, "score": self.total}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a model answers what it answers, by one method.

    Attributes:
        source: Where the model's weights come from.
        method: Its name in `METHODS`.
        unit: Of all scores.
        is_signed: Scores below zero speak against the answer.
        text: What was asked.
        answer: What is explained.
        log_probabilities: Of the answer's tokens, or of its label, in nats.
        log_odds: Of the answer, in nats.
        pictures: In their order.
        sounds: In their order.
        words: Of the text, in order.
        others: What neither a picture nor a sound nor a word has, by name.
        facts: Further figures of the method.
    """

    source: Path
    method: str
    unit: str
    is_signed: bool
    text: str
    answer: Answer
    log_probabilities: tuple[float, ...]
    log_odds: float
    pictures: tuple[PictureScores, ...]
    sounds: tuple[SoundScores, ...]
    words: tuple[Word, ...]
    others: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: pixels, seconds and characters of what was given, and scores in `unit`."""
        answer = {
            "text": self.answer.text,
            "is_given": self.answer.is_given,
            "token_ids": list(self.answer.token_ids),
            "log_probability": sum(self.log_probabilities),
            "log_probabilities": list(self.log_probabilities),
            "log_odds": self.log_odds,
        }
        words = [{"text": one.text, "characters": [one.start, one.stop], "score": one.score} for one in self.words]
        return {
            "source": str(self.source),
            "method": self.method,
            "unit": self.unit,
            "text": self.text,
            "answer": answer,
            "images": [one.to_json() for one in self.pictures],
            "audios": [one.to_json() for one in self.sounds],
            "words": words,
            "others": self.others,
            "totals": self.totals(),
            "facts": self.facts,
        }

    def totals(self) -> dict[str, float]:
        """Sums over each picture, each sound, all words, and of what is left."""
        found = {f"image {number}": one.total for number, one in enumerate(self.pictures)}
        found |= {f"audio {number}": one.total for number, one in enumerate(self.sounds)}
        if self.words:
            found["words"] = sum(one.score for one in self.words)
        return found | self.others

    def largest(self, count: int) -> list[tuple[str, str, float]]:
        """What moves the answer most: what it is, where it is in the source, and its score."""
        found = [
            (f"image {number}", f"x {_pair(one.xyxy[0::2])}, y {_pair(one.xyxy[1::2])} px", one.score)
            for number, picture in enumerate(self.pictures)
            for one in picture.patches
        ]
        found += [
            (f"audio {number}", f"{one.start:.2f}–{one.stop:.2f} s", one.score)
            for number, sound in enumerate(self.sounds)
            for one in sound.spans
        ]
        found += [("word", f"{one.text} ({one.start}–{one.stop})", one.score) for one in self.words]
        return sorted(found, key=lambda one: -abs(one[2]))[:count]


def _pair(edges: tuple[float, ...]) -> str:
    return "–".join(f"{edge:.4g}" for edge in edges)
