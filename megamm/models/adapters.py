"""Small trainable parts inside a composed model whose own weights may stay as they are.

A configuration that names an adapter builds the model with it, so that training, checkpoints, generation and export know of nothing
but more parameters. Every adapter runs whenever the module around it does: the modality contract covers adapters as well.

Shape legend: B rows, S tokens of a row, E width of a block, W width of a bottleneck, K key-value heads, P tokens of a prefix, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import DOCUMENT_ATTENTION
from .low_rank import LowRankLinear, TripletLinear

_TOWERS = {
    "text": ("language_model",),
    "vision": ("vision_tower",),
    "audio": ("audio_tower",),
    "projector": ("vision_projector", "multi_modal_projector"),
}
_NAMES = {"lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "prefix", "bottleneck"}


class Prefix(nn.Module):
    """Keys and values of P tokens that nobody wrote, seen by every token of every document (prefix tuning).

    They carry no position: rotations are the layer's, and a prefix stands behind them.

    Source: arXiv:2101.00190, without the network that makes them there.
    """

    def __init__(self, num_heads: int, num_tokens: int, head_size: int):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(num_heads, num_tokens, head_size))
        # A document begins as it would without a prefix but for the share of attention that leads to nothing.
        self.values = nn.Parameter(torch.zeros(num_heads, num_tokens, head_size))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [K, P, D] each: copies, because ZeRO-3 takes the parameters back when this returns."""
        return self.keys.clone(), self.values.clone()


class Bottleneck(nn.Module):
    """A narrow network behind a block, whose output is added to the block's; it begins as nothing (bottleneck adapter).

    Its weights are its own and no linear layers inside it, because a tower initialises every linear layer it finds, and the second one
    must begin at zero.

    Source: arXiv:1902.00751, one a block, behind it.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(size, width) * width**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(width, size))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float[..., E] to the same shape."""
        return hidden + F.linear(F.gelu(F.linear(hidden, self.down, self.down_bias)), self.up, self.up_bias)


def attach(model: nn.Module, adapter: dict[str, Any] | None) -> None:
    """Put an adapter into a model that has just been built, before weights come into it.

    Args:
        model: `MegaMMModel`.
        adapter: Fields of `megamm.config.schema.Adapter` that say what is built; None leaves the model alone.

    Raises:
        ValueError: A target that nothing in the model answers to, or attention that knows no prefix.
    """
    if adapter is None:
        return
    if adapter["method"] == "prefix":
        _attach_prefixes(model, adapter["prefix_tokens"])
        return
    find = _blocks if adapter["method"] == "bottleneck" else _linear_layers
    for target in adapter["targets"]:
        tower, _, pattern = target.partition(".")
        found = [name for name in find(model, tower) if fnmatchcase(name.rpartition(".")[2], pattern)]
        if not found:
            names = dict.fromkeys(f"{one}.{name.rpartition('.')[2]}" for one in _TOWERS for name in find(model, one))
            raise ValueError(f"{target!r} is nothing that {adapter['method']} adapts in this model; it has {', '.join(names) or 'nothing'}")
        for name in found:
            if adapter["method"] == "bottleneck":
                width = model.config.text_config.hidden_size if tower == "text" else None
                _attach_bottleneck(model, name, adapter["bottleneck_size"], width)
            else:
                _attach_low_rank(model, name, adapter)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return not _NAMES.isdisjoint(name.split("."))


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Names and layers that have a change of low rank."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))


def triplet_layers(model: nn.Module) -> Iterator[tuple[str, TripletLinear]]:
    """Names and layers whose change is a sum of triplets."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TripletLinear))


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the plain model that does what `model` with its changes of low rank does.

    Merged weights are float32, all else is as it is; tied weights stand under all their names.
    """
    merged = {f"{name}.weight": layer.merged_weight() for name, layer in low_rank_layers(model)}
    return {name: merged.get(name, value) for name, value in model.state_dict().items() if not is_adapter(name)}


def _linear_layers(model: nn.Module, tower: str) -> list[str]:
    """Those that are plain or adapted already, so that a layer that two targets name is adapted once."""
    return [name for name, module in _modules(model, tower) if type(module) in (nn.Linear, LowRankLinear, TripletLinear)]


def _blocks(model: nn.Module, tower: str) -> list[str]:
    return [name for name, module in _modules(model, tower) if isinstance(module, GradientCheckpointingLayer)]


def _modules(model: nn.Module, tower: str) -> Iterator[tuple[str, nn.Module]]:
    for part in _TOWERS.get(tower, ()):
        if getattr(model, part) is not None:
            yield from getattr(model, part).named_modules(prefix=part)


def _attach_low_rank(model: nn.Module, name: str, adapter: dict[str, Any]) -> None:
    parent, _, last = name.rpartition(".")
    plain = model.get_submodule(name)
    if isinstance(plain, LowRankLinear):
        return
    size = (plain.in_features, plain.out_features, plain.bias is not None)
    settings = {name: adapter[name] for name in ("rank", "alpha", "dropout")}
    if adapter["method"] == "adalora":
        layer = TripletLinear(*size, **settings)
    else:
        layer = LowRankLinear(*size, **settings, has_magnitude=adapter["method"] == "dora")
    setattr(model.get_submodule(parent), last, layer)


def _attach_bottleneck(model: nn.Module, name: str, size: int, width: int | None) -> None:
    block = model.get_submodule(name)
    if hasattr(block, "bottleneck"):
        return
    if width is None:
        # Blocks of vision and audio towers end on their way back to the width that they came from, which may differ from block to block.
        width = next(module.out_features for module in reversed(list(block.modules())) if isinstance(module, nn.Linear))
    block.bottleneck = Bottleneck(width, size)
    # Inside what activation checkpointing recomputes.
    block.register_forward_hook(_through_bottleneck)


def _through_bottleneck(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (block.bottleneck(output[0]), *output[1:])
    return block.bottleneck(output)


def _attach_prefixes(model: nn.Module, num_tokens: int) -> None:
    text = model.config.text_config
    if text._attn_implementation != DOCUMENT_ATTENTION:
        raise ValueError(f"attention {text._attn_implementation!r} knows no prefix; load the model with 'sdpa'")
    layers = [module for module in model.language_model.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj")]
    if not layers:
        raise ValueError(f"the decoder {text.model_type!r} has no attention layers that a prefix fits; use another method")
    for layer in layers:
        layer.prefix = Prefix(layer.k_proj.out_features // layer.head_dim, num_tokens, layer.head_dim)
