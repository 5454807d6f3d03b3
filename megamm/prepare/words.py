"""Spoken digit words by many voices, at many speeds and pitches, rendered on the spot by espeak-ng.

A voice is an accent with a variant. Held-out variants are never heard in training, under any accent.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
import soxr

from megamm.prepare.espeak import Utterance, render
from megamm.prepare.writer import Shard, ShardWriter

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "Which word is this?"
RATE_HZ = 16000

_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029")
_TRAIN_VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f4", "croak", "klatt", "klatt3", "klatt5", "Alex", "Andrea", "Annie"),
    *("Denis", "Gene", "Mario", "Michael", "Nguyen", "Reed", "adam", "announcer", "aunty", "boris", "caleb", "david", "grandma", "ian"),
)
_TEST_VARIANTS = ("m6", "m8", "f3", "klatt2", "linda", "max", "steph", "travis")
_WORDS_A_MINUTE = (120, 220)
_PITCHES = (30, 70)
_TRAIN_TAKES, _TEST_TAKES = 2, 1
_SILENCE = 0.02
_MARGIN_SECONDS = 0.02
_PEAK = 0.9
_SHARD_SAMPLES = 512


def prepare(
    folder: Path,
    seed: int = 0,
    *,
    accents: Sequence[str] = _ACCENTS,
    train_variants: Sequence[str] = _TRAIN_VARIANTS,
    test_variants: Sequence[str] = _TEST_VARIANTS,
) -> list[Shard]:
    """Write `train` and `test` shards of clips with their word.

    Args:
        folder: Where the shards go.
        seed: Draws speeds and pitches, and the order of the samples.
        accents: Languages of espeak-ng.
        train_variants: Voice variants of espeak-ng for training.
        test_variants: Voice variants to hold out.

    Raises:
        ConfigError: espeakng-loader is not installed or lacks a voice.
        DataError: `folder` already holds such shards.
    """
    with ShardWriter(folder, "train", max_samples=_SHARD_SAMPLES) as train, ShardWriter(folder, "test", max_samples=_SHARD_SAMPLES) as test:
        draw = random.Random(seed)
        for writer, variants, takes in ((train, train_variants, _TRAIN_TAKES), (test, test_variants, _TEST_TAKES)):
            utterances = [
                Utterance(word, accent, variant, draw.randint(*_WORDS_A_MINUTE), draw.randint(*_PITCHES))
                for variant, accent, word, _ in product(variants, accents, WORDS, range(takes))
            ]
            rate_hz, sounds = render(utterances)
            order = list(range(len(utterances)))
            draw.shuffle(order)
            for index in order:
                writer.write(f"word-{index:05}", _document(utterances[index]), {"0.flac": _flac(_clean(sounds[index], rate_hz))})
    return train.shards + test.shards


def _clean(sound: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resample to `RATE_HZ`, cut the silence around the word, and set the peak: float32[samples]."""
    wave = soxr.resample(sound.astype(np.float32), rate_hz, RATE_HZ)
    loud = np.flatnonzero(np.abs(wave) > _SILENCE * np.abs(wave).max())
    margin = round(_MARGIN_SECONDS * RATE_HZ)
    wave = wave[max(loud[0] - margin, 0) : loud[-1] + 1 + margin]
    return wave * (_PEAK / np.abs(wave).max())


def _flac(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _document(utterance: Utterance) -> dict[str, object]:
    question = [{"type": "audio", "member": "0.flac"}, {"type": "text", "text": PROMPT}]
    return {
        "task": "speech_recognition",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": utterance.text}]}],
        "label": utterance.text,
        "voice": utterance.voice,
        "accent": utterance.accent,
        "variant": utterance.variant,
        "rate": utterance.rate,
        "pitch": utterance.pitch,
    }
