"""Attention that keeps its weights: the same result as the kernels', computed step by step for one forward.

Legend: B rows, H heads, K key-value heads, S tokens, D head size, P of a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_NAME = "megamm_recorded"
_WEIGHTS = "recorded_attention_weights"


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Inside, attention layers of a model that go through transformers' attention interface keep their weights for `recorded`."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield
    finally:
        # A configuration hands what it gets to those inside it: outer ones come first in this order, inner ones have the last word.
        for config, implementation in before:
            config._attn_implementation = implementation
        for module in model.modules():
            module.__dict__.pop(_WEIGHTS, None)


def recorded(module: nn.Module) -> list[list[torch.Tensor]]:
    """Of each attention layer inside `module`, in order, the weights float[B, H, S, P + S] of each of its calls."""
    return [layer.__dict__[_WEIGHTS] for layer in module.modules() if _WEIGHTS in layer.__dict__]


def _recorded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, H, D] from [B, H, S, D], [B, K, S, D] and a mask that is added, and the weights."""
    if hasattr(module, "prefix"):
        own_key, own_value = (one.expand(key.shape[0], -1, -1, -1) for one in module.prefix())
        key, value = torch.cat([own_key, key], dim=2), torch.cat([own_value, value], dim=2)
        attention_mask = None if attention_mask is None else F.pad(attention_mask, (own_key.shape[2], 0))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    module.__dict__.setdefault(_WEIGHTS, []).append(weights)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(_NAME, _recorded_attention)
AttentionMaskInterface.register(_NAME, eager_mask)
