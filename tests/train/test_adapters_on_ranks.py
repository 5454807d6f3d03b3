"""Adapters under ZeRO-3 on two ranks that see different modalities: a plain model's gradients, and nothing of the base moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamm.config.schema import Adapter, Batching, Engine, Optimizer
from megamm.core.types import Batch
from megamm.models.adapters import is_adapter, low_rank_layers
from megamm.models.build import config_from_recipe, parameter_groups
from megamm.models.checkpointing import set_activation_checkpointing
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from tests.support.models import NOTHING_STAYS_GATHERED
from tests.support.multimodal import CONTROL_IDS, VOCAB_SIZE, document, pack, tiny_recipe
from tests.support.ranks import run_ranks

METHODS = ("lora", "dora", "adalora", "prefix", "bottleneck")
# In turn no media at all, one kind each, and nothing on a rank.
STEPS = (("text", "text"), ("image", "audio"), ("empty", "both"))


def some_batch(kind: str, seed: int) -> Batch:
    media: dict[str, Any] = {"grid": (2, 2)} if kind in ("image", "both") else {}
    if kind in ("audio", "both"):
        media["frames"] = 70
    return pack([[] if kind == "empty" else [document(seed, 5, **media), document(seed + 50, 3)]], 60)


def gradients(method: str, world: Any) -> dict[str, Any]:
    """Train an adapter everywhere for a few steps; the worst difference to a plain model, and what moved."""
    from deepspeed.utils import safe_get_full_grad

    from megamm.engine import partitions, runtime, settings, weights

    targets = ("text.*", "vision.*", "audio.*") + (() if method == "bottleneck" else ("projector.*",))
    adapter = Adapter(method=method, targets=targets, rank=3, prefix_tokens=3, bottleneck_size=5)  # type: ignore[arg-type]
    config = config_from_recipe(tiny_recipe(), vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS, adapter=adapter)
    ds_config = settings.deepspeed_config(
        Engine(precision="fp32", overrides=NOTHING_STAYS_GATHERED),
        batch=Batching(),
        optim=Optimizer(max_grad_norm=0.0),
        world_size=world.size,
        accumulation=1,
    )
    model = weights.partitioned(lambda: MegaMMForConditionalGeneration(config), ds_config, seed=3)
    for _, layer in low_rank_layers(model):
        if layer.lora_magnitude_vector is not None:
            with weights.whole_float32(list(layer.parameters(recurse=False))):
                layer.reset_magnitude()
    model.model.run_every_tower = True
    set_activation_checkpointing(model, "full")
    engine = runtime.initialize(
        model.train(), ds_config, parameter_groups(model, tiny_recipe(), Optimizer(lr=1e-2), adapter), lambda _: 1.0
    )
    before = dict(partitions.full_tensors(engine))
    worst = 0.0
    for step, kinds in enumerate(STEPS):
        plain = MegaMMForConditionalGeneration(config).train()
        plain.load_state_dict(dict(partitions.full_tensors(engine)), strict=False)
        parameter_groups(plain, tiny_recipe(), Optimizer(), adapter)
        batches = [some_batch(kind, 10 * step + rank) for rank, kind in enumerate(kinds)]
        total = sum(batch.weight_sum for batch in batches)
        engine.backward(engine(**batch_inputs(batches[world.rank], world.device, torch.float32)).loss, 1 / total)
        found = {name: safe_get_full_grad(param) for name, param in engine.module.named_parameters() if param.requires_grad}
        assert engine.step()
        for batch in batches:
            (plain(**batch_inputs(batch, world.device, torch.float32)).loss / total).backward()
        expected = {name: param.grad for name, param in plain.named_parameters() if param.requires_grad}
        assert found.keys() == expected.keys() and all(map(is_adapter, found))
        for name, gradient in expected.items():
            worst = max(worst, float((found[name] - (0.0 if gradient is None else gradient)).abs().max()))
    after = dict(partitions.full_tensors(engine))
    engine.close()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    return {"worst": worst, "moved": sorted(moved), "adapters": sorted(name for name in after if is_adapter(name))}


def check_all_methods() -> dict[str, Any]:
    from megamm.engine import distributed

    world = distributed.start(timeout_seconds=300)
    results = {method: gradients(method, world) for method in METHODS}
    distributed.stop()
    return results


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_adapters_get_a_plain_models_gradients_and_the_base_stays():
    for results in run_ranks(check_all_methods, 2, timeout_seconds=560):
        for method, result in results.items():
            assert result["worst"] < 2e-6, method
            assert result["moved"] == result["adapters"] != [], method
