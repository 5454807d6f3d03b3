"""The composed model under `zero.Init` on two ranks: same weights and buffers as a plain build, and a ResNet tower that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamm.config.schema import Batching, Engine, Optimizer
from megamm.models.build import parameter_groups
from megamm.models.initializers import initializers
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from tests.support.models import NOTHING_STAYS_GATHERED
from tests.support.multimodal import document, pack, tiny_config, tiny_recipe
from tests.support.ranks import run_ranks

SEED = 11


def build_and_step(*towers: str) -> dict[str, Any]:
    """On each rank and for each vision tower: see `_build_and_step`."""
    from megamm.engine import distributed

    world = distributed.start(timeout_seconds=60)
    results = {vision: _build_and_step(vision, world) for vision in towers}
    distributed.stop()
    return results


def _build_and_step(vision: str, world: Any) -> dict[str, Any]:
    """Compare the partitioned bf16 model with a plain one, then take a step with other media on every rank."""
    import deepspeed

    from megamm.engine import runtime, settings, weights

    engine_config = Engine(precision="bf16", overrides=NOTHING_STAYS_GATHERED)
    ds_config = settings.deepspeed_config(engine_config, batch=Batching(), optim=Optimizer(), world_size=world.size, accumulation=1)
    changes = {"vision": vision, "tie_word_embeddings": False}
    config = tiny_config(**changes)
    model = weights.partitioned(lambda: MegaMMForConditionalGeneration(config), ds_config, seed=SEED)
    weights.run_initializers(initializers(model), SEED)

    plain = MegaMMForConditionalGeneration(config)
    ours = {name for name, _, _ in initializers(plain)}
    own_std = {name: float(each.std()) for name, each in plain.named_parameters() if each.numel() >= 512 and name not in ours}
    weights.initialize_weights(plain, SEED)
    weights.run_initializers(initializers(plain), SEED)
    different, spread = [], {}
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters(parameter):
            if not torch.equal(parameter.data, expected.data.bfloat16()):
                different.append(name)
            if name in own_std:
                spread[name] = [float(parameter.data.float().std()), own_std[name]]
    for (name, buffer), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        if buffer.dtype != expected.dtype or not torch.equal(buffer, expected):
            different.append(name)

    model.run_every_tower = True
    engine = runtime.initialize(model.train(), ds_config, parameter_groups(model, tiny_recipe(**changes), Optimizer()), lambda step: 1.0)
    picture = {"grid": (4, 4), "side": 32} if vision == "resnet" else {"grid": (2, 3)}
    batch = pack([[document(0, 5, **(picture if world.rank == 0 else {"frames": 80}))]], 40)
    loss = engine(**batch_inputs(batch, world.device, torch.bfloat16)).loss
    engine.backward(loss, 1 / 12)
    return {"different": different, "spread": spread, "loss": loss.item(), "applied": engine.step()}


@pytest.mark.distributed
def test_partitioned_model_equals_a_plain_build_and_steps():
    towers = ("siglip2_vision_model", "resnet")
    for rank in run_ranks(build_and_step, 2, *towers):
        for vision in towers:
            result = rank[vision]
            assert result["different"] == []
            assert result["applied"] and 0 < result["loss"] < 1000
            assert len(result["spread"]) > 10
            for name, (ours, transformers_own) in result["spread"].items():
                # Two draws of at least 512 normal or uniform numbers: 6 standard errors of a standard deviation.
                assert ours == pytest.approx(transformers_own, rel=0.2), name
