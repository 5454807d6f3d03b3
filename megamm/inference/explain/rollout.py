"""Attribution by attention: how much of each input reaches the place where the answer is read, layer by layer.

A layer is a matrix whose rows say where a state comes from; layers multiply. The way back leads from where the answer is read through the
decoder to words and placeholders, and from the placeholders' embeddings through their tower to patches and frames. A tower without
attention mixes nothing: each of its cells stands for its own place.

Legend: B rows, H heads, S states of a stack, P of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from megamm.core.errors import ConfigError
from megamm.inference.explain.log_odds import LogOdds
from megamm.inference.explain.recorded_attention import recorded, recording
from megamm.inference.prompt import Prompt

_MOST_CHANGE = 1e-2
"""Recorded attention may change the log odds by so much, in nats or as a share: more than rounding does, less than a wrong mask."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Where an answer comes from; all together sum to one.

    Attributes:
        tokens: float64[tokens of the sequence]; placeholders have 0, because theirs went on into the towers.
        cells: float64[rows, columns] of each picture.
        sounds: float64[tokens] of each sound.
        prefix: Of a learned prefix.
    """

    tokens: torch.Tensor
    cells: list[torch.Tensor]
    sounds: list[torch.Tensor]
    prefix: float


@dataclass(frozen=True, slots=True)
class AttentionMethod:
    """How attention becomes shares.

    Attributes:
        mix: From the matrices float64[S, S] of a stack's layers, the first layer first, to where each state comes from.
        uses_gradient: Attention is weighed by its gradient, so that only what speaks for the answer counts.
    """

    mix: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    uses_gradient: bool


def rolled_out(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows that sum to one: half of each state is kept by the residual connection, the other half is mixed.

    Source: arXiv:2005.00928, section 3.
    """
    own = result = torch.eye(len(layers[0]), dtype=torch.float64)
    for layer in layers:
        mixed = layer + own
        result = mixed / mixed.sum(1, keepdim=True) @ result
    return result


def relevant(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows that sum to one: half of each state is its own, the other half what spoke through it.

    Source: arXiv:2103.15679, equations 5, 6, 8 and 9.
    """
    own = result = torch.eye(len(layers[0]), dtype=torch.float64)
    for layer in layers:
        result = result + layer @ result
    mixed = result - own
    total = mixed.sum(1, keepdim=True)
    # A state that nothing spoke through is its own.
    return torch.where(total > 0, (mixed / total + own) / 2, own)


def trace(log_odds: LogOdds, method: AttentionMethod) -> Shares:
    """Follow an answer back to its inputs.

    Raises:
        ConfigError: The decoder's attention cannot be recorded.
    """
    with recording(log_odds.model):
        decoder, pictures, sounds = _mixings(log_odds, method)
    prompt, ids, config = log_odds.prompt, log_odds.input_ids.cpu(), log_odds.model.config
    rows, sizes = log_odds.read_at(), num_cells(prompt)
    tokens, prefix = torch.zeros(len(ids), dtype=torch.float64), 0.0
    cells = list(rows["vision"].split(sizes)) if "vision" in rows else [torch.zeros(size, dtype=torch.float64) for size in sizes]
    heard = rows.get("audio", torch.zeros(len(sounds), dtype=torch.float64))
    if "decoder" in rows:
        *_, prefix = reached = F.pad(rows["decoder"], (0, 1)) @ decoder
        tokens, seen = reached[:-1], ids == config.image_token_id
        merged = tokens[seen].split([image.num_tokens for image in prompt.images]) if prompt.images else ()
        cells = [_spread(one, image.grid, config.image_features["merge"]) for one, image in zip(merged, prompt.images, strict=True)]
        heard = tokens[ids == config.audio_token_id]
        tokens = tokens.masked_fill(seen | (ids == config.audio_token_id), 0.0)
    traced = [(one @ mixing).view(image.grid) for one, mixing, image in zip(cells, pictures, prompt.images, strict=True)]
    return Shares(tokens, traced, list((heard @ sounds).split([audio.num_tokens for audio in prompt.audios])), float(prefix))


def num_cells(prompt: Prompt) -> list[int]:
    """Cells of each picture's grid, before neighbours are merged."""
    return [image.grid[0] * image.grid[1] for image in prompt.images]


def _mixings(log_odds: LogOdds, method: AttentionMethod) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Where states come from: the decoder's float64[S + 1, S + 1] (the last is its prefix), each picture's, and all sounds' together."""
    model, prompt = log_odds.model.model, log_odds.prompt
    score = _score(log_odds, method.uses_gradient)
    num_layers, decoder = model.config.text_config.num_hidden_layers, _layers(model.language_model, score)
    if len(decoder) != num_layers:
        raise ConfigError(
            f"{len(decoder)} of the decoder's {num_layers} layers have attention that can be recorded; take --method integrated instead"
        )
    # A tower that is not called once a layer with one picture behind the other counts like one without attention.
    seen = [layer[0] for layer in _layers(model.vision_tower, score) if len(layer) == 1 and len(layer[0]) == len(prompt.images)]
    pictures = [
        method.mix([layer[number, :size, :size] for layer in seen] or [torch.eye(size, dtype=torch.float64)])
        for number, size in enumerate(num_cells(prompt))
    ]
    # Sounds are heard in windows, one call each.
    heard = [torch.block_diag(*(window for call in layer for window in call)) for layer in _layers(model.audio_tower, score)]
    num_heard = sum(audio.num_tokens for audio in prompt.audios)
    sounds = method.mix(heard or [torch.eye(num_heard, dtype=torch.float64)])
    return method.mix([_with_prefix(layer[0][0]) for layer in decoder]), pictures, sounds


def _score(log_odds: LogOdds, has_gradient: bool) -> torch.Tensor:
    """The log odds, scalar, of a forward whose attention is recorded.

    Raises:
        ConfigError: Recording changes what the model says.
    """
    values = {kind: value[None].clone().requires_grad_(has_gradient) for kind, value in log_odds.values.items()}
    with torch.set_grad_enabled(has_gradient):
        score = log_odds(values).sum()
    change = abs(float(score.detach()) - log_odds.at_input)
    if change > _MOST_CHANGE * max(1.0, abs(log_odds.at_input)):
        raise ConfigError(
            f"attention of this model cannot be recorded: the log odds change by {change:.2g} when it is; take --method integrated"
        )
    return score


def _layers(part: nn.Module | None, score: torch.Tensor) -> list[list[torch.Tensor]]:
    """float64[B, S, P + S] of each call of each layer of a part of the model, heads averaged."""
    layers = [] if part is None else recorded(part)
    flat = [call for layer in layers for call in layer]
    if score.requires_grad and flat:
        gradients = torch.autograd.grad(score, flat, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(one) if gradient is None else (one * gradient).clamp(min=0)
            for one, gradient in zip(flat, gradients, strict=True)
        ]
    means = iter([one.detach().double().mean(1).cpu() for one in flat])
    return [[next(means) for _ in layer] for layer in layers]


def _with_prefix(layer: torch.Tensor) -> torch.Tensor:
    """float64[S + 1, S + 1] of float64[S, P + S]: a prefix becomes a last state, which comes from nowhere."""
    num_states, num_prefix = layer.shape[0], layer.shape[1] - layer.shape[0]
    square = layer.new_zeros(num_states + 1, num_states + 1)
    square[:-1, :-1], square[:-1, -1] = layer[:, num_prefix:], layer[:, :num_prefix].sum(1)
    return square


def _spread(tokens: torch.Tensor, grid: tuple[int, int], merge: int) -> torch.Tensor:
    """float64[rows x columns] of a picture's tokens: each stands for the square of cells that was merged into it."""
    merged = tokens.view(grid[0] // merge, grid[1] // merge)
    return merged.repeat_interleave(merge, 0).repeat_interleave(merge, 1).flatten() / merge**2
