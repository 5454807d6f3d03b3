"""The settings of all tries, and what the loader must give: digests of samples encoded without any shard."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmarks.faults.case import Files
from megamm.config import AudioFeatures, Batching, Data, Dataset, ImageFeatures, Model, Reading, Tokenizer, Tower
from megamm.core.types import Batch, TokenSequence
from megamm.data.ledger import BadSample
from megamm.data.media.features import MediaRules
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.mapping import OWN_FORM
from megamm.tokenizers import text
from megamm.tokenizers.text import TextTokenizer

DATASET = "faults"
MODEL = Model(
    text=Tower("qwen3"),
    vision=Tower("siglip2_vision_model"),
    audio=Tower("qwen3_asr_encoder"),
    image_features=ImageFeatures(patch_size=4, max_patches=16),
    audio_features=AudioFeatures(num_mel=16),
)
BATCH = Batching(row_tokens=512, global_rows=1)
RULES = MediaRules.of(MODEL, Data())


def settings(root: Path, shards: str, **changes: Any) -> Data:
    """What a recipe of these tries says of its data."""
    data = Data(
        root=str(root),
        train={DATASET: Dataset(shards)},
        row_patches=64,
        row_frames=3200,
        prefetch_steps=1,
        max_skipped_share=1.0,
        max_skipped_in_a_row=1000,
        reading=Reading(block_bytes=4096, timeout_seconds=1.0, retries=2),
    )
    return replace(data, **changes)


def train_tokenizer(folder: Path, texts: list[str], text_size: int) -> TextTokenizer:
    """A small tokenizer."""
    return text.train(texts * 20, Tokenizer(text_size=text_size, location_bins=0), folder)


@lru_cache(maxsize=1)
def load_tokenizer() -> TextTokenizer:
    """The tokenizer of all tries."""
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(Path(folder), ["the first text, the last text, a small answer, plain words"], text_size=300)


@lru_cache(maxsize=64)
def expected(files: frozenset[tuple[str, bytes]], key: str) -> str | None:
    """Digest of a sample that was encoded without any shard; None for what cannot be encoded."""
    members = dict(files)
    try:
        sample = OWN_FORM.sample(key, members, list(members), shard="truth")
        sequence, _ = SampleEncoder(load_tokenizer(), RULES).encode(DATASET, sample)
    except BadSample:
        return None
    return sequence_digest(sequence)


def expected_all(truth: Mapping[str, Files]) -> dict[str, str | None]:
    """`expected` of every sample of a shard."""
    return {key: expected(frozenset(files.items()), key) for key, files in truth.items()}


def sequence_digest(sequence: TokenSequence) -> str:
    """Digest of everything that training sees of a sample."""
    arrays = [sequence.input_ids, sequence.labels, sequence.weights]
    arrays += [image.pixels for image in sequence.images]
    return _digest([*arrays, *(audio.mel for audio in sequence.audios)])


def delivered(batch: Batch) -> Iterator[tuple[str, str]]:
    """Key and digest of every document of a batch; media belong to the documents in the order of their places."""
    control_id = load_tokenizer().vocabulary.control_id
    image = audio = 0
    for row, keys in enumerate(batch.keys):
        start = 0
        for key, length in zip(keys, batch.document_lengths[row], strict=False):
            place = row, slice(start, start + length)
            ids = batch.input_ids[place]
            arrays = [ids.astype(np.int32), batch.labels[place].astype(np.int32), batch.weights[place]]
            for _ in range(int((ids == control_id("image_start")).sum())):
                assert batch.pixels is not None and batch.pixel_mask is not None
                arrays.append(batch.pixels[image][batch.pixel_mask[image] == 1])
                image += 1
            for _ in range(int((ids == control_id("audio_start")).sum())):
                assert batch.mel is not None and batch.mel_mask is not None
                arrays.append(batch.mel[audio][:, batch.mel_mask[audio] == 1])
                audio += 1
            start += length
            yield key.removeprefix(f"{DATASET}/"), _digest(arrays)


def _digest(arrays: list[np.ndarray]) -> str:
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(f"{array.dtype}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).view(np.uint8).data)
    return state.hexdigest()
