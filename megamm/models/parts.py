"""The parts of the composed model that are not stock modules: projectors, frozen batch norms, placing of embeddings.

Shape legend: B rows, S tokens of a row, E decoder width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_megamm import MegaMMConfig


class VisionProjector(nn.Module):
    """Two layers from the vision tower to the decoder, in the shape of `Lfm2VlMultiModalProjector`."""

    def __init__(self, config: MegaMMConfig):
        super().__init__()
        channels = config.vision_hidden_size * config.image_features["merge"] ** 2
        self.layer_norm = nn.LayerNorm(channels) if config.projector_use_layernorm else None
        self.linear_1 = nn.Linear(channels, config.projector_hidden_size, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size, bias=config.projector_bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float[tokens, channels x merge²] to float[tokens, E]."""
        if self.layer_norm is not None:
            features = self.layer_norm(features)
        return self.linear_2(self.act(self.linear_1(features)))


class AudioProjector(nn.Module):
    """Two layers from the audio tower to the decoder, exactly `Qwen3ASRMultiModalProjector`, so that its weights fit."""

    def __init__(self, config: MegaMMConfig):
        super().__init__()
        audio = config.audio_config
        self.linear_1 = nn.Linear(audio.d_model, audio.d_model)
        self.act = ACT2FN[audio.activation_function]
        self.linear_2 = nn.Linear(audio.d_model, audio.output_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float[tokens, audio width] to float[tokens, E]."""
        return self.linear_2(self.act(self.linear_1(features)))


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that always uses its stored statistics and whose affine weights do not train.

    Statistics of a rank's own pictures would make a row's result depend on its batch and differ between ranks. Statistics
    may be in fp32 beside weights and pictures in bf16.
    """

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float[N, C, H, W] to the same shape."""
        # Detached, because loading a folder replaces parameters by ones that require gradients.
        weight, bias = (one.detach().to(self.running_mean.dtype) for one in (self.weight, self.bias))
        return F.batch_norm(pixels, self.running_mean, self.running_var, weight, bias, eps=self.eps)


def freeze_batch_norms(module: nn.Module) -> None:
    """Turn every batch norm inside `module` into a frozen one; names and values stay."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__ = FrozenBatchNorm2d
            norm.requires_grad_(False)


def merge_neighbours(map_RCD: torch.Tensor, merge: int) -> torch.Tensor:
    """Join `merge` x `merge` neighbouring cells of a feature map into one token, tokens in reading order.

    Args:
        map_RCD: float[rows, columns, channels].
        merge: Side of the square that becomes one token; divides rows and columns.

    Returns:
        float[rows x columns / merge², channels x merge²].

    Source: `Lfm2VlMultiModalProjector.pixel_unshuffle` (same order of channels).
    """
    rows, columns, channels = map_RCD.shape
    cells = map_RCD.reshape(rows // merge, merge, columns // merge, merge, channels)
    return cells.permute(0, 2, 1, 3, 4).reshape(-1, merge * merge * channels)


def place(embeds_BSE: torch.Tensor, ids_BS: torch.Tensor, token_id: int, features: torch.Tensor | None, what: str) -> torch.Tensor:
    """Replace the embeddings of placeholders by tower embeddings, in order.

    Raises:
        ValueError: The numbers differ.
    """
    positions = (ids_BS.reshape(-1) == token_id).nonzero().squeeze(1)
    num_features = 0 if features is None else features.shape[0]
    if len(positions) != num_features:
        raise ValueError(
            f"{len(positions)} {what} placeholders (id {token_id}) but {num_features} {what} embeddings; "
            "expand each placeholder to its number of tokens and pass the media in the same order"
        )
    if features is None:
        return embeds_BSE
    flat = embeds_BSE.reshape(-1, embeds_BSE.shape[-1])
    return flat.index_copy(0, positions, features.to(flat.dtype)).view_as(embeds_BSE)


def nothing_of(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A zero that depends on `features`; each is multiplied by zero before the sum, which could overflow in fp16."""
    return (features * 0.0).sum().to(like.dtype)
