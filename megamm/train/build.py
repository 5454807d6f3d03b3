"""From a recipe to the things that a run needs, in the order in which they depend on each other."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm.config import Recipe
from megamm.core.errors import ConfigError
from megamm.data.planning.deal import resolve_accumulation
from megamm.engine import distributed, runtime, settings, weights
from megamm.engine.distributed import World
from megamm.inference.load import TRAINED_DTYPES, run_config
from megamm.models.adapters import low_rank_layers
from megamm.models.build import build_model, parameter_groups
from megamm.models.checkpointing import set_activation_checkpointing
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.head import check_head
from megamm.models.initializers import initializers
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.models.weights import pretrained_folders, pretrained_weights
from megamm.tokenizers.text import TextTokenizer
from megamm.train.origin import Origin, load_origin
from megamm.train.rank_budget import RankAllocator, check_budget
from megamm.train.schedule import lr_factor


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What `build_trainer` made.

    Attributes:
        engine: The model under ZeRO.
        config: Its configuration.
        ds_config: DeepSpeed's merged settings.
        dtype: Of the forward pass.
        num_micro_steps: Micro-steps a step on this number of ranks.
        group_names: Of the optimizer's parameter groups, in order.
        ranks: Shares ranks out among the adapter's layers; None for adapters whose ranks stay.
    """

    engine: runtime.Engine
    config: MegaMMConfig
    ds_config: dict[str, Any]
    dtype: torch.dtype
    num_micro_steps: int
    group_names: tuple[str, ...]
    ranks: RankAllocator | None


def load_tokenizer(recipe: Recipe, archived: Path | None = None) -> TextTokenizer:
    """The run's archived tokenizer where there is one, else the recipe's.

    Raises:
        ConfigError: There is none.
    """
    if archived is not None and archived.is_dir():
        return TextTokenizer.load(archived)
    return TextTokenizer.load(Path(recipe.tokenizer.folder))


def build_trainer(recipe: Recipe, tokenizer: TextTokenizer, world: World, origin: Origin | None = None) -> Trainer:
    """Build the model partitioned over the ranks, warm-start what the recipe says or what it starts from, and put it under DeepSpeed.

    Args:
        recipe: What is trained.
        tokenizer: Its vocabulary is the model's.
        world: The ranks.
        origin: What the run starts from; None to start by itself.

    Raises:
        ConfigError: What the run starts from is of another model, or batch arithmetic, towers or settings that do not fit together.
    """
    with distributed.fail_together():
        num_micro_steps = resolve_accumulation(recipe.batch, world.size)
        ds_config = settings.deepspeed_config(
            recipe.engine, batch=recipe.batch, optim=recipe.optim, world_size=world.size, accumulation=num_micro_steps
        )
        check_budget(recipe.adapter, recipe.train.steps)
        factor = lr_factor(recipe.schedule, recipe.train.steps)
        config = run_config(recipe, tokenizer.vocabulary)
        if recipe.model.head is not None:
            check_head(recipe.model.head, config)
        if recipe.engine.precision == "fp16" and world.device.type == "cpu":
            raise ConfigError('engine.precision="fp16" does not train on the CPU; use bf16 or fp32')
    _seed(recipe, world)

    def construct() -> MegaMMForConditionalGeneration:
        return build_model(config, recipe.model.head)

    model = weights.partitioned(construct, ds_config, seed=recipe.engine.seed)
    weights.run_initializers(initializers(model), recipe.engine.seed)
    filled = load_start(model, recipe, config, origin)
    _begin_magnitudes(model, filled)
    model.loss_chunk_tokens = recipe.loss.chunk_tokens
    # The modality contract: without it ranks that see different modalities hang or train on stale gradients.
    model.model.run_every_tower = True
    set_activation_checkpointing(model, recipe.engine.activation_checkpointing)
    model.train()
    groups = _optimizer_groups(model, recipe)
    engine = runtime.initialize(model, ds_config, groups, factor)
    return Trainer(
        engine=engine,
        config=config,
        ds_config=ds_config,
        dtype=TRAINED_DTYPES[recipe.engine.precision],
        num_micro_steps=num_micro_steps,
        group_names=tuple(group["name"] for group in groups),
        ranks=RankAllocator(engine, recipe.adapter, recipe.train.steps) if recipe.adapter.method == "adalora" else None,
    )


def load_start(model: MegaMMForConditionalGeneration, recipe: Recipe, config: MegaMMConfig, origin: Origin | None) -> set[str]:
    """Fill a new model with the weights that its run starts from: the origin's, and those of towers that start from folders of their own.

    Returns:
        Names that were filled.

    Raises:
        ConfigError: The origin's weights do not fit, or a tower's folder does not.
    """
    if origin is not None and not origin.is_needed:
        return set()
    filled = set() if origin is None else load_origin(model, origin)
    towers = pretrained_folders(recipe.model) if origin is None else origin.towers
    return filled | weights.load_weights(model, pretrained_weights(recipe.model, config, towers))


def _optimizer_groups(model: MegaMMForConditionalGeneration, recipe: Recipe) -> list[dict[str, Any]]:
    optim = recipe.optim
    common = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    return [{**group, **common} for group in parameter_groups(model, recipe.model, optim, recipe.adapter)]


def _begin_magnitudes(model: MegaMMForConditionalGeneration, filled: set[str]) -> None:
    """Let DoRA's lengths be those of the weights that are in the model by now, unless they came with these."""
    for name, layer in low_rank_layers(model):
        if layer.lora_magnitude_vector is not None and f"{name}.lora_magnitude_vector" not in filled:
            with weights.whole_float32(list(layer.parameters(recurse=False))):
                layer.reset_magnitude()


def _seed(recipe: Recipe, world: World) -> None:
    """Everything random outside the data plan and the initial weights; ranks draw differently."""
    seed = recipe.engine.seed * 100_003 + world.rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if recipe.engine.deterministic:
        # Ops without a deterministic kernel warn instead of failing: none of the stock towers' forward paths needs them.
        torch.use_deterministic_algorithms(True, warn_only=True)
