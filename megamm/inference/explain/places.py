"""From what a model sees back to the source: patches to pixels, frames to seconds, tokens to words and characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megamm.config import AudioFeatures
from megamm.core.lengths import AUDIO_CHUNK_FRAMES, audio_num_tokens
from megamm.core.types import ImageInput

_TOKEN_FRAMES = 8
"""Mel frames of a token of sound but for the last of a chunk: three convolutions of stride 2."""

# Scripts without spaces count a character as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff00-\uffef"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


@dataclass(frozen=True, slots=True)
class Patch:
    """A rectangle of a picture, left, top, right and bottom in source pixels, and its score."""

    xyxy: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a sound in seconds, and its score."""

    start: float
    stop: float
    score: float


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a text, its first character and the one behind it, and its score."""

    text: str
    start: int
    stop: int
    score: float


def patches(scores: np.ndarray, image: ImageInput) -> tuple[Patch, ...]:
    """Patches in reading order.

    Args:
        scores: float[rows, columns].
        image: The picture as the model sees it.
    """
    rows, columns = scores.shape
    found = []
    for (row, column), score in np.ndenumerate(scores):
        corners = (column / columns, row / rows), ((column + 1) / columns, (row + 1) / rows)
        (left, top), (right, bottom) = (image.view.source(corner) for corner in corners)
        # The way back through shares of the view leaves rounding behind.
        found.append(Patch((round(left, 6), round(top, 6), round(right, 6), round(bottom, 6)), float(score)))
    return tuple(found)


def token_of_frame(num_frames: int) -> np.ndarray:
    """int64[F]: the token that each mel frame of a sound goes into."""
    chunk, frame = np.divmod(np.arange(num_frames), AUDIO_CHUNK_FRAMES)
    return chunk * audio_num_tokens(AUDIO_CHUNK_FRAMES) + frame // _TOKEN_FRAMES


def spans(scores: np.ndarray, num_frames: int, features: AudioFeatures) -> tuple[Span, ...]:
    """Stretches of a sound, one a token; a short sound's go on into the silence that it is padded with.

    Args:
        scores: float[tokens].
        num_frames: Mel frames of the sound.
        features: Their rate.
    """
    firsts = np.flatnonzero(np.diff(token_of_frame(num_frames), prepend=-1))
    seconds = np.append(firsts, num_frames) * features.hop_length / features.rate_hz
    return tuple(Span(*map(float, one)) for one in zip(seconds[:-1], seconds[1:], scores, strict=True))


def words(text: str, token_spans: Sequence[tuple[int, int]], scores: np.ndarray) -> tuple[Word, ...]:
    """Words with the sums of their tokens' scores.

    A token belongs to the word in which its first character that is no space stands; spaces alone to the word that begins behind them,
    or else to the one before. A word without a token of its own is written with the word whose token it shares.

    Args:
        text: What was encoded.
        token_spans: First character and the one behind the last of each token.
        scores: float[tokens].
    """
    found = [match.span() for match in _WORD.finditer(text)]
    if not found:
        return (Word(text, 0, len(text), float(scores.sum())),) if len(text) else ()
    firsts = np.array([first for first, _ in found])
    owners = [_owner(text, span, firsts) for span in token_spans]
    known = sorted(set(owners))
    stops = [found[following - 1][1] for following in known[1:]] + [found[-1][1]]
    starts = [found[0][0], *(found[number][0] for number in known[1:])]
    totals = np.bincount(owners, weights=scores, minlength=len(found))
    return tuple(
        Word(text[start:stop], start, stop, float(totals[number])) for number, start, stop in zip(known, starts, stops, strict=True)
    )


def _owner(text: str, span: tuple[int, int], firsts: np.ndarray) -> int:
    start, stop = span
    piece = text[start:stop]
    return max(0, int(np.searchsorted(firsts, start + len(piece) - len(piece.lstrip()), side="right")) - 1)
