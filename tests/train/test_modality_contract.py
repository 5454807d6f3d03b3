"""Every pair of modality subsets on two ranks: no hang, and the gradients of a plain single-process model.

The learning rate is 0, so the weights stay and one reference serves all pairs; every pair still goes through DeepSpeed's whole
step. Plain ZeRO-3 re-applies the last gradient of a tower that nobody used: the order of the pairs makes that visible.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from megamm.config.schema import Batching, Engine, Model, Optimizer
from megamm.core.types import Batch
from megamm.models.build import config_from_recipe, parameter_groups
from megamm.models.checkpointing import set_activation_checkpointing
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from tests.support.models import NOTHING_STAYS_GATHERED
from tests.support.multimodal import CONTROL_IDS, VOCAB_SIZE, document, pack, tiny_recipe
from tests.support.ranks import run_ranks

NUM_ACCUMULATION = 2
SUBSETS = ("empty", "text", "image", "audio", "both")


def model_recipe(towers_train: bool) -> Model:
    recipe = tiny_recipe()
    vision, audio = (dataclasses.replace(tower, trainable=towers_train) for tower in (recipe.vision, recipe.audio))
    return dataclasses.replace(recipe, vision=vision, audio=audio)


def random_batch(subset: str, seed: int) -> Batch:
    """One row of two documents of a modality subset, with uneven loss weights; `empty` has no document at all."""
    random = np.random.default_rng(seed)
    media = {"grid": (2, 1 + seed % 3)} if subset in ("image", "both") else {}
    if subset in ("audio", "both"):
        media["frames"] = int(random.integers(20, 130))
    documents = [] if subset == "empty" else [document(2 * seed + each, int(random.integers(2, 8)), **media) for each in (0, 1)]
    return pack([documents], 96, {label: float(random.choice([0.5, 1.0, 2.0])) for label in range(VOCAB_SIZE)})


def check_all_pairs(towers_train: bool) -> dict[str, Any]:
    """On each rank: train every pair of subsets and compare all gradients with a plain model's."""
    from deepspeed.utils import safe_get_full_grad

    from megamm.engine import distributed, partitions, runtime, settings, weights

    world = distributed.start(timeout_seconds=60)
    recipe = model_recipe(towers_train)
    config = config_from_recipe(recipe, vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS)
    ds_config = settings.deepspeed_config(
        Engine(precision="fp32", overrides=NOTHING_STAYS_GATHERED),
        batch=Batching(),
        optim=Optimizer(max_grad_norm=0.0),
        world_size=world.size,
        accumulation=NUM_ACCUMULATION,
    )
    model = weights.partitioned(lambda: MegaMMForConditionalGeneration(config), ds_config, seed=3)
    model.model.run_every_tower = True
    set_activation_checkpointing(model, "full")
    groups = [{**group, "lr": 0.0} for group in parameter_groups(model, recipe, Optimizer())]
    engine = runtime.initialize(model.train(), ds_config, groups, lambda step: 1.0)

    plain = MegaMMForConditionalGeneration(config).train()
    plain.load_state_dict(dict(partitions.full_tensors(engine)), strict=False)
    parameter_groups(plain, recipe, Optimizer())

    worst, unused_zero = 0.0, True
    # The second micro-step swaps the ranks' subsets: a tower is absent in the first or in the second one only, and one order is enough.
    for number, pair in enumerate(itertools.combinations_with_replacement(SUBSETS, 2)):
        batches = {
            (rank, micro): random_batch(pair[(rank + micro) % 2], 10 * number + 2 * micro + rank) for rank in (0, 1) for micro in (0, 1)
        }
        weight_sum = sum(batch.weight_sum for batch in batches.values()) or 1.0
        for micro in range(NUM_ACCUMULATION):
            output = engine(**batch_inputs(batches[world.rank, micro], world.device, torch.float32))
            engine.backward(output.loss, 1 / weight_sum)
        gradients = {name: safe_get_full_grad(param) for name, param in engine.module.named_parameters() if param.requires_grad}
        assert engine.step()

        plain.zero_grad(set_to_none=True)
        for batch in batches.values():
            (plain(**batch_inputs(batch, world.device, torch.float32)).loss / weight_sum).backward()
        for name, param in plain.named_parameters():
            if not param.requires_grad:
                assert name not in gradients
                continue
            expected = torch.zeros_like(param) if param.grad is None else param.grad
            worst = max(worst, float((gradients[name] - expected).abs().max()))
            if param.grad is None or not param.grad.any():
                unused_zero &= not gradients[name].any()
    distributed.stop()
    return {"worst": worst, "unused_zero": bool(unused_zero)}


@pytest.mark.distributed
@pytest.mark.parametrize("towers_train", [True, False], ids=["trained", "frozen"])
def test_every_pair_of_modality_subsets_equals_the_plain_model(towers_train):
    for result in run_ranks(check_all_pairs, 2, towers_train, timeout_seconds=240):
        assert result["worst"] < 2e-6
        assert result["unused_zero"]
