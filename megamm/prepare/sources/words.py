"""Spoken digit words by many voices, at many speeds and pitches, rendered on the spot by espeak-ng.

A voice is an accent with a variant. Held-out variants are never heard in training, under any accent.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from itertools import product

import numpy as np

from megamm.prepare.espeak import Utterance, render
from megamm.prepare.rows import names
from megamm.prepare.source import SEED, Draft, Listing, Option, Record, Source

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_QUESTION = "Which word is this?"
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


def _records(*, seed: int, accents: Sequence[str], train_variants: Sequence[str], test_variants: Sequence[str]) -> Listing:
    """Every clip is a record; the seed draws speeds and pitches.

    All clips are rendered at once, because a voice sounds the same only after the same utterances.

    Raises:
        ConfigError: espeakng-loader is not installed or lacks a voice.
    """
    draw = random.Random(seed)
    records = []
    for split, variants, takes in (("train", train_variants, _TRAIN_TAKES), ("test", test_variants, _TEST_TAKES)):
        utterances = [
            Utterance(word, accent, variant, draw.randint(*_WORDS_A_MINUTE), draw.randint(*_PITCHES))
            for variant, accent, word, _ in product(variants, accents, WORDS, range(takes))
        ]
        rate_hz, sounds = render(utterances)
        for index, (utterance, sound) in enumerate(zip(utterances, sounds, strict=True)):
            records.append(Record(f"{split}-{index:05}", sound.nbytes, (utterance, rate_hz, sound.tobytes()), split))
    return Listing(records, _make)


def _make(record: Record) -> Draft:
    utterance, rate_hz, sound = record.data
    wave = _clean(np.frombuffer(sound, np.int16), rate_hz)
    return Draft(_document(utterance), {"0.flac": _flac(wave)})


def _clean(sound: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resample to `RATE_HZ`, cut the silence around the word, and set the peak: float32[samples]."""
    import soxr

    wave = soxr.resample(sound.astype(np.float32), rate_hz, RATE_HZ)
    loud = np.flatnonzero(np.abs(wave) > _SILENCE * np.abs(wave).max())
    margin = round(_MARGIN_SECONDS * RATE_HZ)
    wave = wave[max(loud[0] - margin, 0) : loud[-1] + 1 + margin]
    return wave * (_PEAK / np.abs(wave).max())


def _flac(wave: np.ndarray) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, wave, RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _document(utterance: Utterance) -> dict[str, object]:
    question = [{"type": "audio", "member": "0.flac"}, {"type": "text", "text": _QUESTION}]
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


SOURCE = Source(
    name="words",
    help="spoken digit words in many voices, rendered by espeak-ng; test voices are never heard in training",
    records=_records,
    options=(
        SEED,
        Option("accents", "languages of espeak-ng, with commas between them", names, _ACCENTS, "A,B,…"),
        Option("train_variants", "voice variants of espeak-ng for training", names, _TRAIN_VARIANTS, "A,B,…"),
        Option("test_variants", "voice variants that are held out", names, _TEST_VARIANTS, "A,B,…"),
    ),
    samples_a_shard=512,
)
