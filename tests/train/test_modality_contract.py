"""Every pair of modality subsets on two ranks: no hang, and the gradients of a plain single-process model.

The learning rate is 0, so the weights stay and one reference serves all pairs; every pair still goes through DeepSpeed's whole
step. Plain ZeRO-3 re-applies the last gradient of a tower that nobody used: the order of the pairs makes that visible.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.support.batches import CONTROL_IDS, NUM_MEL, PATCH_SIZE, SUBSETS, VOCAB_SIZE, random_batch
from tests.support.models import NOTHING_STAYS_GATHERED
from tests.support.ranks import run_ranks

from megamm.config.schema import AudioFeatures, Batching, Engine, ImageFeatures, Model, Optimizer, Tower
from megamm.models.build import config_from_recipe, parameter_groups
from megamm.models.checkpointing import set_activation_checkpointing
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH_SIZE,
    "num_patches": 4,
    "vision_use_head": False,
}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "downsample_hidden_size": 8,
    "num_mel_bins": NUM_MEL,
}
NUM_ACCUMULATION = 2


def model_recipe(*, towers_train: bool) -> Model:
    return Model(
        text=Tower("qwen3", config={**TEXT, "tie_word_embeddings": True}),
        vision=Tower("siglip2_vision_model", trainable=towers_train, config=VISION),
        audio=Tower("qwen3_asr_encoder", trainable=towers_train, config=AUDIO),
        image_features=ImageFeatures(patch_size=PATCH_SIZE, max_patches=4),
        audio_features=AudioFeatures(num_mel=NUM_MEL),
    )


def check_all_pairs(towers_train: bool) -> dict[str, Any]:
    """On each rank: train every pair of subsets and compare all gradients with a plain model's."""
    from deepspeed.utils import safe_get_full_grad

    from megamm.engine import distributed, partitions, runtime, settings, weights

    world = distributed.start(timeout_seconds=60)
    recipe = model_recipe(towers_train=towers_train)
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
        batches = {(rank, micro): random_batch(pair[(rank + micro) % 2], 10 * number + 2 * micro + rank) for rank in (0, 1) for micro in (0, 1)}
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
