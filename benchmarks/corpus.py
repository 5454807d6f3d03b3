"""Shards to measure on: every sample is a photograph, five seconds of sound, a question and an answer.

Made of real photographs, clips and sentences where `MEGAMM_DATA` names their folder, of smooth noise otherwise. The same seed
gives the same shards.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from megamm.config import AudioFeatures, Batching, Data, Dataset, ImageFeatures, Model, Tokenizer, Tower
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.lengths import ensure_lengths
from megamm.prepare.source import Draft
from megamm.prepare.writer import ShardFile, sample_files
from megamm.tokenizers import text
from megamm.tokenizers.text import TextTokenizer

RATE_HZ, SECONDS = 16_000, 5
MIN_SIDE, MAX_SIDE = 256, 512
JPEG_QUALITY = 85
QUESTION = "What do you see, and what is said?"
# 14 x 14 patches of 16 pixels: the area of 224 x 224, at the picture's own aspect ratio.
MODEL = Model(
    text=Tower("qwen3"),
    vision=Tower("siglip2_vision_model"),
    audio=Tower("qwen3_asr_encoder"),
    image_features=ImageFeatures(patch_size=16, max_patches=196),
    audio_features=AudioFeatures(rate_hz=RATE_HZ),
)
BATCH = Batching(row_tokens=2048, global_rows=8, micro_rows=4)


@dataclass(frozen=True)
class Corpus:
    """Shards with their planned lengths and their tokenizer.

    Attributes:
        folder: Holds `train-*.tar` and `tokenizer`.
        origin: What the samples were made of, in words.
        num_samples: Of all shards.
    """

    folder: Path
    origin: str
    num_samples: int

    @property
    def tars(self) -> list[Path]:
        """The shards."""
        return sorted(self.folder.glob("train-*.tar"))

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Trained on the samples' sentences."""
        return TextTokenizer.load(self.folder / "tokenizer")

    @property
    def data(self) -> Data:
        """Settings that read the shards."""
        return Data(root=str(self.folder), train={"samples": Dataset("train-*.tar")}, row_patches=2048, row_frames=8000)

    def plan(self, **changes) -> DataPlan:
        """A plan over the shards; keywords replace settings of `Data`."""
        return DataPlan.open(replace(self.data, **changes), BATCH, model=MODEL, tokenizer=self.tokenizer, seed=0)


def make_corpus(folder: Path, *, num_shards: int = 8, samples_a_shard: int = 64, seed: int = 0) -> Corpus:
    """Write shards, indexes, tokenizer and planned lengths."""
    rng = np.random.default_rng(seed)
    root = os.environ.get("MEGAMM_DATA")
    raw = _real(Path(root)) if root else _generated(rng)
    tokenizer = text.train([QUESTION, *raw.sentences] * 4, Tokenizer(text_size=512, location_bins=0), folder / "tokenizer")
    for shard in range(num_shards):
        with ShardFile(folder / f"train-{shard:05}.tar") as file:
            for number in range(samples_a_shard):
                key = f"s{shard:03}-{number:04}"
                file.add(key, sample_files(key, _draft(raw, rng)))
    corpus = Corpus(folder, raw.origin, num_shards * samples_a_shard)
    ensure_lengths(corpus.tars, tokenizer, MediaRules.of(MODEL, corpus.data))
    return corpus


@dataclass(frozen=True)
class _Raw:
    """What samples are made of: `tiles` uint8[H, W, 3], `sounds` float32[n], `sentences`."""

    origin: str
    tiles: list[np.ndarray]
    sounds: list[np.ndarray]
    sentences: list[str]


def _real(root: Path) -> _Raw:
    photographs = sorted(root.glob("flowers96/*/*.jpg"))[:400]
    clips = [*sorted(root.glob("ljspeech32/*.ogg")), *sorted(root.glob("esc10_16k/*/*.ogg"))[::4]]
    lines = (root / "ljspeech32" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    return _Raw(
        origin="collages of photographs (flowers96), speech and sounds (ljspeech32, esc10_16k)",
        tiles=[np.asarray(Image.open(path).convert("RGB")) for path in photographs],
        sounds=[soundfile.read(path, dtype="float32")[0] for path in clips],
        sentences=[line.split("|")[-1] for line in lines],
    )


def _generated(rng: np.random.Generator) -> _Raw:
    """Smooth noise compresses and decodes about like photographs and voices do; white noise would not."""
    words = ("red", "yellow", "flower", "petal", "voice", "rain", "seven", "quiet", "garden", "the", "and", "of")
    return _Raw(
        origin="generated pictures and sounds (MEGAMM_DATA is not set)",
        tiles=[_smooth_picture(rng) for _ in range(64)],
        sounds=[_smooth_sound(rng) for _ in range(32)],
        sentences=[" ".join(rng.choice(words, int(rng.integers(4, 30)))) for _ in range(64)],
    )


def _smooth_picture(rng: np.random.Generator) -> np.ndarray:
    picture = np.zeros((96, 96, 3))
    for size, weight in ((3, 90), (12, 50), (48, 25)):
        coarse = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        picture += weight / 165 * np.asarray(coarse.resize((96, 96), Image.Resampling.BICUBIC))
    return picture.clip(0, 255).astype(np.uint8)


def _smooth_sound(rng: np.random.Generator) -> np.ndarray:
    time = np.arange(8 * RATE_HZ) / RATE_HZ
    wave = sum(np.sin(2 * np.pi * pitch * time + rng.uniform(0, 6)) / (1 + rank) for rank, pitch in enumerate(rng.uniform(90, 3000, 8)))
    loudness = np.interp(time, np.linspace(0, 8, 40), rng.uniform(0.01, 0.15, 40))
    return (loudness * wave + rng.normal(0, 0.003, len(time))).astype(np.float32)


def _draft(raw: _Raw, rng: np.random.Generator) -> Draft:
    question = [{"type": "image", "member": "0.jpg"}, {"type": "audio", "member": "1.flac"}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": raw.sentences[rng.integers(len(raw.sentences))]}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Draft({"task": "description", "messages": messages}, {"0.jpg": _jpeg(raw.tiles, rng), "1.flac": _flac(raw.sounds, rng)})


def _jpeg(tiles: list[np.ndarray], rng: np.random.Generator) -> bytes:
    """Tiles side by side: enlarging a small photograph would leave little to decode."""
    width, height = rng.integers(MIN_SIDE, MAX_SIDE + 1, 2).tolist()
    canvas = Image.new("RGB", (width, height))
    for left, top in _grid(width, height, tiles[0].shape[0]):
        canvas.paste(Image.fromarray(tiles[rng.integers(len(tiles))]), (left, top))
    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _grid(width: int, height: int, side: int) -> Iterator[tuple[int, int]]:
    return ((left, top) for top in range(0, height, side) for left in range(0, width, side))


def _flac(sounds: list[np.ndarray], rng: np.random.Generator) -> bytes:
    wave = sounds[rng.integers(len(sounds))]
    wanted = SECONDS * RATE_HZ
    start = int(rng.integers(max(1, len(wave) - wanted + 1)))
    wave = wave[start : start + wanted]
    file = io.BytesIO()
    soundfile.write(file, np.pad(wave, (0, wanted - len(wave))), RATE_HZ, format="FLAC")
    return file.getvalue()
