"""A small corpus of three datasets, indexed, with planned lengths, and the settings that read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from megamm.config import AudioFeatures, Batching, Data, Dataset, ImageFeatures, Model, Tokenizer, Tower
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.lengths import ensure_lengths
from megamm.data.shards.index import write_index
from megamm.tokenizers import text
from megamm.tokenizers.text import TextTokenizer
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar

# A busy machine is no failure; what must be fast is measured in processor time.
settings.register_profile("megamm", deadline=None)
settings.load_profile("megamm")

MODEL = Model(
    text=Tower("qwen3"),
    vision=Tower("siglip2_vision_model"),
    audio=Tower("qwen3_asr_encoder"),
    image_features=ImageFeatures(patch_size=4, max_patches=16),
    audio_features=AudioFeatures(num_mel=16),
)
BATCH = Batching(row_tokens=128, global_rows=6)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    texts = [f"the {word} is number {number}" for number in range(100) for word in ("cat", "dog", "ship", "seven", "plain words")]
    return text.train(texts, Tokenizer(text_size=320, location_bins=0), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, tokenizer) -> Path:
    """`digits` (pictures, 3 shards), `words` (sounds, 2 shards), `text` (7 shards of unequal size); never written to."""
    root = tmp_path_factory.mktemp("corpus")
    build_corpus(root)
    ensure_lengths(sorted(root.glob("*/*.tar")), tokenizer, MediaRules.of(MODEL, Data()))
    return root


def build_corpus(root: Path) -> None:
    rng = np.random.default_rng(0)
    ask = {"type": "text", "text": "what is it?"}
    for shard in range(3):
        samples = {}
        for number in range(17):
            width, height = rng.integers(8, 40, 2).tolist()
            picture = chat([{"type": "image", "member": "0.jpg"}, ask], f"the cat is number {number}")
            samples[f"d{shard}-{number}"] = as_files(picture, _0_jpg=jpeg(width, height, seed=number))
        write_index(write_tar(root / f"digits/train-{shard:05}.tar", samples).absolute())
    for shard in range(2):
        samples = {}
        for number in range(9):
            sound = chat([{"type": "audio", "member": "0.flac"}], "seven", task="speech_recognition")
            samples[f"w{shard}-{number}"] = as_files(sound, _0_flac=flac(int(rng.integers(2000, 20000)), seed=number))
        write_index(write_tar(root / f"words/train-{shard:05}.tar", samples))
    for shard in range(7):
        samples = {f"t{shard}-{number}": as_files(text_document("plain words " * int(rng.integers(1, 9)))) for number in range(shard + 1)}
        write_index(write_tar(root / f"text/train-{shard:05}.tar", samples))


@pytest.fixture
def settings_of() -> Callable[..., Data]:
    """Data settings of a corpus; keywords replace them."""

    def make(root: Path, **changes: Any) -> Data:
        train = {name: Dataset(f"{name}/train-*.tar", weight) for name, weight in (("digits", 3.0), ("words", 1.0), ("text", 2.0))}
        data = Data(root=str(root), train=train, window=32, row_patches=48, row_frames=400, prefetch_steps=2, max_skipped_share=0.0)
        return replace(data, **changes)

    return make


@pytest.fixture
def open_plan(tokenizer, settings_of) -> Callable[..., DataPlan]:
    """A plan over a corpus; keywords named like settings of `Data` or `Batching` replace them."""

    def open_(root: Path, *, batch: Batching = BATCH, seed: int = 5, **changes: Any) -> DataPlan:
        return DataPlan.open(settings_of(root, **changes), batch, model=MODEL, tokenizer=tokenizer, seed=seed)

    return open_
