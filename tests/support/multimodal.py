"""A tiny vision-audio-language model and packed batches for it, made without the data room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megamm.config.schema import AudioFeatures, ImageFeatures, Model, Tower
from megamm.core.lengths import AUDIO_CHUNK_FRAMES, audio_num_tokens, image_num_tokens
from megamm.core.types import IGNORE_LABEL, Batch
from megamm.models.build import config_from_recipe
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration

_MEDIA_NAMES = ("image_start", "image", "image_end", "audio_start", "audio", "audio_end", "box_start", "box_end")
_NAMES = ("pad", "bos", "eos", "system", "user", "assistant", "end", *_MEDIA_NAMES)
VOCAB_SIZE = 128
CONTROL_IDS = {name: 64 + index for index, name in enumerate(_NAMES)}
IMAGE, AUDIO = CONTROL_IDS["image"], CONTROL_IDS["audio"]
PATCH, NUM_MEL = 4, 16
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "num_patches": 16,
}
AUDIO_TOWER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "downsample_hidden_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def tiny_recipe(
    *, vision: str = "siglip2_vision_model", audio: bool = True, merge: int = 1, max_scale: float = 100.0, **text: Any
) -> Model:
    """The recipe's model; `vision` is a tower type or empty, `text` changes the decoder."""
    towers = {
        "siglip2_vision_model": (VISION, ImageFeatures(patch_size=PATCH, max_patches=16, merge=merge, max_scale=max_scale)),
        "resnet": (RESNET, ImageFeatures(kind="fixed", size=32, stride=8, merge=merge)),
    }
    values, features = towers.get(vision, ({}, ImageFeatures()))
    return Model(
        text=Tower(type="qwen3", config=TEXT | text),
        vision=Tower(type=vision, config=values) if vision else None,
        audio=Tower(type="qwen3_asr_encoder", config=AUDIO_TOWER) if audio else None,
        image_features=features,
        audio_features=AudioFeatures(num_mel=NUM_MEL),
    )


def tiny_config(**changes: Any) -> MegaMMConfig:
    """Configuration of `tiny_recipe(**changes)`."""
    return config_from_recipe(tiny_recipe(**changes), vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS)


def tiny_model(seed: int = 0, **changes: Any) -> MegaMMForConditionalGeneration:
    """A model whose weights are far from zero, so that every path carries signal."""
    torch.manual_seed(seed)
    model = MegaMMForConditionalGeneration(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass
class Document:
    """One sample: ids, shifted labels and the media behind its placeholders."""

    ids: list[int]
    labels: list[int]
    pictures: list[np.ndarray] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    sounds: list[np.ndarray] = field(default_factory=list)


def document(
    seed: int, num_text: int = 6, *, grid: tuple[int, int] | None = None, frames: int = 0, merge: int = 1, side: int = 0
) -> Document:
    """A document of text, with a picture of `grid` patches (or a square of `side` pixels) and a sound of `frames` where wanted."""
    random = np.random.default_rng(seed)
    result = Document(ids=[CONTROL_IDS["bos"]], labels=[])
    if grid is not None:
        shape = (3, side, side) if side else (grid[0] * grid[1], 3 * PATCH * PATCH)
        result.pictures.append(random.standard_normal(shape).astype(np.float32))
        result.grids.append(grid)
        result.ids += [CONTROL_IDS["image_start"], *[IMAGE] * image_num_tokens(grid, merge), CONTROL_IDS["image_end"]]
    if frames:
        result.sounds.append(random.standard_normal((NUM_MEL, frames)).astype(np.float32))
        result.ids += [CONTROL_IDS["audio_start"], *[AUDIO] * audio_num_tokens(frames), CONTROL_IDS["audio_end"]]
    first = len(result.ids)
    result.ids += random.integers(0, 64, num_text).tolist()
    result.labels = [IGNORE_LABEL] * (first - 1) + result.ids[first:] + [CONTROL_IDS["end"]]
    return result


def pack(rows: Sequence[Sequence[Document]], row_tokens: int, weights: dict[int, float] | None = None) -> Batch:
    """Rows of documents as the data room collates them; `weights` is the loss weight by label id."""
    batch = Batch(
        input_ids=np.full((len(rows), row_tokens), CONTROL_IDS["pad"]),
        labels=np.full((len(rows), row_tokens), IGNORE_LABEL),
        weights=np.zeros((len(rows), row_tokens), np.float32),
        position_ids=np.zeros((len(rows), row_tokens), np.int64),
        task_ids=np.full((len(rows), row_tokens), -1),
        document_lengths=[],
        num_padding=[],
        tasks=("text",),
    )
    for index, row in enumerate(rows):
        lengths = [len(one.ids) for one in row]
        padding = row_tokens - sum(lengths)
        assert padding >= 0, "the row is too short for its documents"
        batch.document_lengths.append([*lengths, padding] if padding else lengths)
        batch.num_padding.append(padding)
        batch.position_ids[index] = np.concatenate([np.arange(length) for length in batch.document_lengths[-1]])
        ids, labels = ([token for one in row for token in getattr(one, name)] for name in ("ids", "labels"))
        assert len(ids) == len(labels), "a document needs a label at every position"
        batch.input_ids[index, : len(ids)], batch.labels[index, : len(ids)] = ids, labels
        batch.task_ids[index, : len(ids)] = 0
        batch.weights[index, : len(ids)] = [0.0 if one == IGNORE_LABEL else (weights or {}).get(one, 1.0) for one in labels]
    _add_media(batch, [one for row in rows for one in row])
    return batch


def _add_media(batch: Batch, documents: list[Document]) -> None:
    pictures = [picture for one in documents for picture in one.pictures]
    if pictures:
        batch.image_grids = np.array([grid for one in documents for grid in one.grids])
        if pictures[0].ndim == 3:
            batch.pixels = np.stack(pictures)
        else:
            longest = max(map(len, pictures))
            batch.pixels = np.stack([np.pad(one, [(0, longest - len(one)), (0, 0)]) for one in pictures])
            batch.pixel_mask = np.stack([np.arange(longest) < len(one) for one in pictures]).astype(np.int64)
    sounds = [sound for one in documents for sound in one.sounds]
    if sounds:
        longest = -(-max(one.shape[1] for one in sounds) // AUDIO_CHUNK_FRAMES) * AUDIO_CHUNK_FRAMES
        batch.mel = np.stack([np.pad(one, [(0, 0), (0, longest - one.shape[1])]) for one in sounds])
        batch.mel_mask = np.stack([np.arange(longest) < one.shape[1] for one in sounds]).astype(np.int64)
