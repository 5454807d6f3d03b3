"""Floating-point operations of a training step on what the batch really holds: the numerator of MFU.

Padding, dummies and recomputed activations count nothing. A multiply-add is two operations. Matrices cost 2 a weight and token
in the forward, 2 for the gradient of their input and 2 for their own, so a part costs 6 where it trains, 4 where gradients only
flow through it, 2 where it is frozen at the input. Attention has no weights of its own: its backward costs twice its forward.

Source: Chowdhery et al., PaLM, appendix B (model FLOPs utilisation), with the windows of this model's towers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from megamm.config.schema import Adapter, Head, Model, Tower
from megamm.core.lengths import AUDIO_CHUNK_FRAMES, audio_num_tokens
from megamm.core.types import IGNORE_LABEL, Batch
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.flops import head_flops
from megamm.models.heads.head import state_width, tower_widths
from megamm.models.heads.masked import cell_sizes

_FORWARD, _THROUGH, _TRAINED = 2, 4, 6


@dataclass(frozen=True)
class BatchSizes:
    """What a micro-batch costs by.

    Attributes:
        documents: Tokens of each real document.
        num_supervised: Tokens with a label.
        patches: Patches of each picture; squares of a fixed-size tower count their cells.
        frames: Mel frames of each sound.
    """

    documents: tuple[int, ...]
    num_supervised: int
    patches: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: Batch) -> BatchSizes:
        """Measure a collated micro-batch."""
        documents: list[int] = []
        for lengths, num_padding in zip(batch.document_lengths, batch.num_padding, strict=True):
            documents += lengths[:-1] if num_padding else lengths
        return cls(
            documents=tuple(documents),
            num_supervised=int(np.count_nonzero(batch.labels != IGNORE_LABEL)),
            patches=() if batch.image_grids is None else tuple(int(rows * columns) for rows, columns in batch.image_grids),
            frames=() if batch.mel_mask is None else tuple(int(one) for one in batch.mel_mask.sum(axis=1)),
        )


def train_flops(config: MegaMMConfig, sizes: BatchSizes, recipe: Model, adapter: Adapter | None = None) -> float:
    """Operations of forward and backward over one micro-batch.

    What an adapter itself computes is not counted: it is next to nothing. A head on towers' states leaves the decoder and the projectors
    out, and so do its operations, although the modality contract runs them.

    Args:
        config: The composed model's configuration.
        sizes: What the micro-batch holds.
        recipe: Which towers train (projectors always do), and the head where it has one.
        adapter: The recipe's adapter, where it has one; gradients go through frozen towers that hold adapters.
    """
    head = recipe.head
    seen = "decoder" if head is None else head.states
    total = 0 if head is None else _head_flops(config, sizes, head)
    if seen == "decoder":
        text = _factor("text", recipe.text, adapter)
        has_media = bool(sizes.patches or sizes.frames)
        total += _decoder_flops(config, sizes, _THROUGH if text == _FORWARD and has_media else text)
    if sizes.patches and seen != "audio":
        factor = _factor("vision", recipe.vision, adapter)
        total += _vision_flops(config, sizes.patches, factor=factor)
        total += _vision_projector_flops(config, sizes.patches, factor=factor) if seen == "decoder" else 0
    if sizes.frames and seen != "vision":
        factor = _factor("audio", recipe.audio, adapter)
        total += _audio_flops(config, sizes.frames, factor=factor)
        total += _audio_projector_flops(config, sizes.frames, factor=factor) if seen == "decoder" else 0
    return float(total)


def _head_flops(config: MegaMMConfig, sizes: BatchSizes, head: Head) -> int:
    if head.kind != "masked":
        return head_flops(head, state_width(head, config), _states(config, sizes, head))
    values, num_states = cell_sizes(config), {"vision": sum(sizes.patches), "audio": sum(map(audio_num_tokens, sizes.frames))}
    return sum(_TRAINED * num_states[name] * width * values[name] for name, width in tower_widths(head, config).items())


def _states(config: MegaMMConfig, sizes: BatchSizes, head: Head) -> list[int]:
    """How many states the head looks at, of each document; heads but linear ones have one picture or sound a document."""
    if head.kind == "linear":
        return [1] * len(sizes.documents)
    if head.kind == "ctc":
        return [audio_num_tokens(one) for one in sizes.frames]
    merged = config.image_features["merge"] ** 2 if head.states == "decoder" else 1
    return [one // merged for one in sizes.patches]


def _factor(name: str, tower: Tower, adapter: Adapter | None) -> int:
    """Operations of a multiplication in a tower's weights, forward and backward."""
    if adapter is None or not adapter.freezes_base:
        return _TRAINED if tower.trainable else _FORWARD
    towers = {"text"} if adapter.method == "prefix" else {target.partition(".")[0] for target in adapter.targets}
    return _THROUGH if name in towers else _FORWARD


def _decoder_flops(config: MegaMMConfig, sizes: BatchSizes, factor: int) -> int:
    text = config.text_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_size, text.num_key_value_heads * head_size
    matrices = text.hidden_size * (2 * queries + 2 * keys) + 3 * text.hidden_size * text.intermediate_size
    # A causal document has half the pairs: scores and mixing cost 2 operations a pair and query channel each.
    attention = 2 * queries * _squares(sizes.documents)
    head = sizes.num_supervised * text.hidden_size * text.vocab_size
    layers = text.num_hidden_layers
    return factor * (sum(sizes.documents) * layers * matrices + head) + _passes(factor) * layers * attention


def _vision_flops(config: MegaMMConfig, patches: Sequence[int], *, factor: int) -> int:
    vision = config.vision_config
    if not config.is_patch_tower:
        return len(patches) * _square_flops(vision.to_json_string(), config.image_features["size"], factor != _FORWARD)
    embedding = 3 * vision.patch_size**2 * vision.hidden_size
    # The first matrix has no input to pass a gradient to.
    first = (_THROUGH if factor == _TRAINED else _FORWARD) * sum(patches) * embedding
    return first + _encoder_flops(vision, patches, patches, factor=factor)


def _vision_projector_flops(config: MegaMMConfig, patches: Sequence[int], *, factor: int) -> int:
    merged = config.vision_hidden_size * config.image_features["merge"] ** 2
    is_first = factor == _FORWARD and not config.projector_use_layernorm
    num_tokens = sum(patches) // config.image_features["merge"] ** 2
    return num_tokens * _projector_flops(merged, config.projector_hidden_size, config.text_config.hidden_size, is_first=is_first)


def _audio_flops(config: MegaMMConfig, frames: Sequence[int], *, factor: int) -> int:
    audio = config.audio_config
    tokens = [audio_num_tokens(one) for one in frames]
    window = audio_num_tokens(AUDIO_CHUNK_FRAMES) * (audio.n_window_infer // AUDIO_CHUNK_FRAMES)
    windows = [piece for one in tokens for piece in [window] * (one // window) + ([one % window] if one % window else [])]
    # Adapters lie behind the convolutions.
    trains, front_factor = factor == _TRAINED, factor if factor == _TRAINED else _FORWARD
    front, bands, length = 0, audio.num_mel_bins, AUDIO_CHUNK_FRAMES
    channels = (1, *[audio.downsample_hidden_size] * 3)
    for layer in range(3):
        bands, length = (bands + 1) // 2, (length + 1) // 2
        weights = 9 * channels[layer] * channels[layer + 1]
        front += (front_factor - 2 * (trains and layer == 0)) * weights * bands * length
    front += front_factor * audio.downsample_hidden_size * bands * audio.d_model * length
    # The last chunk of a sound is convolved whole, but only its real share counts.
    num_chunks = sum(frames) / AUDIO_CHUNK_FRAMES
    return int(num_chunks * front) + _encoder_flops(audio, tokens, windows, factor=factor)


def _audio_projector_flops(config: MegaMMConfig, frames: Sequence[int], *, factor: int) -> int:
    audio = config.audio_config
    num_tokens = sum(audio_num_tokens(one) for one in frames)
    return num_tokens * _projector_flops(audio.d_model, audio.d_model, audio.output_dim, is_first=factor == _FORWARD)


def _projector_flops(width: int, hidden: int, out: int, *, is_first: bool) -> int:
    """A token through a projector, whose first matrix passes no gradient on where nothing before it trains."""
    return (_THROUGH if is_first else _TRAINED) * width * hidden + _TRAINED * hidden * out


def _encoder_flops(tower: PreTrainedConfig, tokens: Sequence[int], windows: Sequence[int], *, factor: int) -> int:
    """Blocks of a bidirectional tower with as many key as query heads and a two-matrix perceptron."""
    matrices = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    attention = 4 * tower.hidden_size * _squares(windows)
    return tower.num_hidden_layers * (factor * sum(tokens) * matrices + _passes(factor) * attention)


def _passes(factor: int) -> int:
    """Forwards' worth of attention: the backward, where there is one, costs two."""
    return 1 if factor == _FORWARD else 3


def _squares(lengths: Sequence[int]) -> int:
    return sum(one * one for one in lengths)


@lru_cache(maxsize=8)
def _square_flops(config_json: str, side: int, trains: bool) -> int:
    """A picture through a fixed-size tower, counted by running it, and its backward where it trains, without data."""
    values = json.loads(config_json)
    with torch.device("meta"):
        tower = AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).requires_grad_(trains)
        with FlopCounterMode(display=False) as counter:
            hidden = tower(pixel_values=torch.zeros(1, 3, side, side)).last_hidden_state
            if trains:
                hidden.sum().backward()
    return counter.get_total_flops()
