"""A small stock decoder under the real engine, for tests of the engine and of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megamm.config.schema import Batching, Engine, Optimizer
from megamm.engine import runtime, settings, weights

NOTHING_STAYS_GATHERED = {
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_max_live_parameters": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "zero_optimization.enable_sanity_checks": True,
}
"""A tiny model would never be split otherwise."""


def small_decoder(**changes: Any) -> Qwen3ForCausalLM:
    """About 50,000 parameters with sizes that two and three ranks do not divide evenly."""
    return Qwen3ForCausalLM(small_decoder_config(**changes))


def small_decoder_config(**changes: Any) -> Qwen3Config:
    """What `small_decoder` is."""
    arguments: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 97,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
    }
    return Qwen3Config(**(arguments | changes))


def small_config(
    world_size: int, *, preset: str = "zero3", precision: str = "bf16", accumulation: int = 1, **overrides: Any
) -> dict[str, Any]:
    """The DeepSpeed config of a test: everything split, small buckets."""
    engine = Engine(preset=preset, precision=precision, overrides=NOTHING_STAYS_GATHERED | overrides)  # type: ignore[arg-type]
    optim = Optimizer(max_grad_norm=1.0)
    return settings.deepspeed_config(engine, batch=Batching(), optim=optim, world_size=world_size, accumulation=accumulation)


def start_engine(model: torch.nn.Module, ds_config: dict[str, Any], lr: float = 1e-2) -> runtime.Engine:
    """Two parameter groups (with and without decay) and a warm-up over four steps."""
    params = [param for param in model.parameters() if param.requires_grad]
    shape = lambda param: tuple(getattr(param, "ds_shape", param.shape))  # noqa: E731
    common = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [
        {"params": [param for param in params if len(shape(param)) > 1], "weight_decay": 0.1, **common},
        {"params": [param for param in params if len(shape(param)) == 1], "weight_decay": 0.0, **common},
    ]
    return runtime.initialize(model, ds_config, groups, lambda step: min(1.0, (step + 1) / 4))


def build_engine(world_size: int, *, seed: int = 0, freeze: str = "", **settings_changes: Any) -> runtime.Engine:
    """A partitioned small decoder under ZeRO; parameters whose name holds `freeze` do not train."""
    ds_config = small_config(world_size, **settings_changes)
    model = weights.partitioned(small_decoder, ds_config, seed=seed)
    for name, param in model.named_parameters():
        if freeze and freeze in name:
            param.requires_grad_(False)
    return start_engine(model.train(), ds_config)


def token_batch(step: int, num_rows: int = 6, num_tokens: int = 16) -> torch.Tensor:
    """int64[num_rows, num_tokens], the same everywhere for a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 131, (num_rows, num_tokens), generator=generator)


def train(engine: runtime.Engine, rank: int, world_size: int, first: int, last: int) -> list[float]:
    """Steps `first` to `last - 1` on each rank's share of the global batch; returns this rank's losses."""
    losses = []
    for step in range(first, last):
        rows = token_batch(step)[rank::world_size].split(-(-(6 // world_size) // engine.num_accumulation))
        total = 0.0
        for row in rows:
            loss = engine(input_ids=row, labels=row, use_cache=False).loss * row.shape[0]
            engine.backward(loss, 1 / 6)
            total += float(loss.detach())
        engine.step()
        losses.append(total)
    return losses
