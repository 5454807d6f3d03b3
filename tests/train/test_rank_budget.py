"""AdaLoRA under ZeRO: peft's ranks and weights on any number of ranks, a budget that is reached, state that goes on exactly."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.config.schema import Adapter, Batching, Engine, Optimizer, RankBudget
from megamm.core.errors import CheckpointError, ConfigError
from megamm.models.adapters import is_adapter, triplet_layers
from megamm.models.build import config_from_recipe, parameter_groups
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.train.rank_budget import RankAllocator, check_budget, orthogonality_gradient
from tests.support.models import NOTHING_STAYS_GATHERED
from tests.support.multimodal import CONTROL_IDS, VOCAB_SIZE, document, pack, tiny_recipe
from tests.support.ranks import run_ranks

NUM_STEPS = 9
SAVED = (3, 7)  # While ranks fall, and after they are final.
BUDGET = RankBudget(initial_rank=4, warmup_steps=2, final_steps=3, every=2, orthogonality=0.3)
ADAPTER = Adapter(method="adalora", targets=("text.[qv]_proj", "text.down_proj", "vision.fc?"), rank=2, alpha=8.0, budget=BUDGET)
# AdamW divides by what may be nearly nothing: with a larger constant, last places stay last places.
OPTIMIZER = Optimizer(lr=0.05, eps=1e-3, weight_decay=0.0, max_grad_norm=0.0)


def adapted_config(adapter: Adapter = ADAPTER):
    return config_from_recipe(tiny_recipe(audio=False), vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS, adapter=adapter)


def step_batches(step: int):
    """The two rows of a step; two ranks have one each."""
    return [pack([[document(10 * step + row, 9, grid=(2, 2)), document(10 * step + row + 5, 7)]], 40) for row in range(2)]


def build(world: Any, engine: Engine) -> tuple[Any, RankAllocator]:
    from megamm.engine import runtime, settings, weights

    ds_config = settings.deepspeed_config(engine, batch=Batching(), optim=OPTIMIZER, world_size=world.size, accumulation=2 // world.size)
    config = adapted_config()
    model = weights.partitioned(lambda: MegaMMForConditionalGeneration(config), ds_config, seed=3)
    model.model.run_every_tower = True
    groups = parameter_groups(model, tiny_recipe(audio=False), OPTIMIZER, ADAPTER)
    groups = [{**group, "eps": OPTIMIZER.eps, "betas": (OPTIMIZER.beta1, OPTIMIZER.beta2)} for group in groups]
    started = runtime.initialize(model.train(), ds_config, groups, lambda _: 1.0)
    return started, RankAllocator(started, ADAPTER, NUM_STEPS)


def train(engine: Any, ranks: RankAllocator, world: Any, step: int) -> None:
    batches = step_batches(step)
    total = sum(batch.weight_sum for batch in batches)
    for batch in batches[world.rank :: world.size]:
        engine.backward(engine(**batch_inputs(batch, world.device, torch.float32)).loss, 1 / total)
    ranks.before_update()
    ranks.after_update(applied=engine.step())


def at_stages(zero_stages: list[int]) -> list[dict[str, Any]]:
    from megamm.engine import distributed

    world = distributed.start(timeout_seconds=300)
    results = [train_beside_peft(world, stage) for stage in zero_stages]
    distributed.stop()
    return results


def train_beside_peft(world: Any, zero_stage: int) -> dict[str, Any]:
    """Ours on these ranks, peft's model and allocator in this process; the worst differences and the triplets that are left."""
    from peft import AdaLoraConfig, get_peft_model

    from megamm.engine import partitions

    overrides = NOTHING_STAYS_GATHERED if zero_stage == 3 else {}
    engine, ranks = build(world, Engine(preset=f"zero{zero_stage}", precision="fp32", overrides=overrides))
    begin = dict(partitions.full_tensors(engine))
    plain = MegaMMForConditionalGeneration(adapted_config(Adapter()))
    plain.load_state_dict({name: value for name, value in begin.items() if not is_adapter(name)}, strict=False)
    layers = [name for name, _ in triplet_layers(engine.module)]
    theirs = get_peft_model(
        plain,
        AdaLoraConfig(
            init_r=BUDGET.initial_rank,
            target_r=ADAPTER.rank,
            lora_alpha=ADAPTER.alpha,
            tinit=BUDGET.warmup_steps,
            tfinal=BUDGET.final_steps,
            deltaT=BUDGET.every,
            beta1=BUDGET.sensitivity_decay,
            beta2=BUDGET.uncertainty_decay,
            total_step=NUM_STEPS,
            target_modules=layers,
        ),
    )
    trained = {name.removeprefix("base_model.model.").removesuffix(".default"): one for name, one in theirs.named_parameters()}
    trained = {name: one for name, one in trained.items() if is_adapter(name)}
    with torch.no_grad():
        for name, one in trained.items():
            one.copy_(begin[name])
    optimizer = torch.optim.AdamW(
        trained.values(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps, weight_decay=0.0
    )
    left, worst = [], 0.0
    for step in range(1, NUM_STEPS + 1):
        train(engine, ranks, world, step)
        batches = step_batches(step)
        total = sum(batch.weight_sum for batch in batches)
        # peft adds its penalty to the sum that a forward returns.
        theirs.peft_config["default"].orth_reg_weight = BUDGET.orthogonality * total / len(batches)
        for batch in batches:
            # Not `theirs` itself, which without a task type goes past the penalty.
            (theirs.base_model(**batch_inputs(batch, world.device, torch.float32)).loss / total).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        ours = dict(partitions.full_tensors(engine))
        worst = max(worst, *(float((ours[name] - one).abs().max()) for name, one in trained.items()))
        left.append([int((ours[f"{layer}.lora_E"] != 0).sum()) for layer in layers])
    pattern = theirs.peft_config["default"].rank_pattern
    kept = ranks.to_json()["kept"]
    same = all("".join(str(int(bit)) for bit in pattern[f"{layer}.lora_E.default"]) == kept[layer] for layer in layers)
    moved = [name for name, value in dict(partitions.full_tensors(engine)).items() if not torch.equal(value, begin[name])]
    engine.close()
    return {"worst": worst, "left": left, "same": same, "mean_rank": ranks.mean_rank, "moved": all(map(is_adapter, moved)) and bool(moved)}


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("num_ranks", "zero_stages"), [(1, [3]), (2, [3, 2, 1])])
def test_any_number_of_ranks_does_what_peft_does(num_ranks, zero_stages):
    pytest.importorskip("peft", reason="needs the extra `adapters`")
    for result in chain(*run_ranks(at_stages, num_ranks, zero_stages, timeout_seconds=560)):
        assert result["worst"] < 2e-5 and result["same"] and result["moved"], result
        num_layers = len(result["left"][0])
        totals = [sum(one) for one in result["left"]]
        # All at first, the budget at the end; what was taken may come back until ranks are final.
        assert totals[1] == BUDGET.initial_rank * num_layers and totals[3] < totals[1]
        assert totals[-4:] == [ADAPTER.rank * num_layers] * 4 and result["mean_rank"] == ADAPTER.rank
        assert len(set(result["left"][-1])) > 1, "layers that all keep the same rank show nothing"


def save_and_go_on(folder: str) -> list[dict[str, Any]]:
    """Train to the end with checkpoints on the way, then from each of them in a new engine; what differs at the end."""
    from megamm.checkpoint.commit import Progress
    from megamm.checkpoint.load import load
    from megamm.engine import distributed, partitions
    from tests.support.checkpoints import save

    world = distributed.start(timeout_seconds=300)
    settings = Engine(precision="bf16", overrides=NOTHING_STAYS_GATHERED)
    engine, ranks = build(world, settings)
    paths = {}
    for step in range(1, NUM_STEPS + 1):
        train(engine, ranks, world, step)
        if step in SAVED:
            paths[step] = save(Path(folder), engine, world, Progress(step, {"ranks": ranks.to_json()}))
    unbroken = {key: tensor.clone() for key, tensor in partitions.local_state(engine, rank=world.rank)}
    record = ranks.to_json()
    engine.close()
    found = []
    for num_done, path in paths.items():
        engine, ranks = build(world, settings)
        ranks.restore(load(path, engine, world).data_state["ranks"])
        for step in range(num_done + 1, NUM_STEPS + 1):
            train(engine, ranks, world, step)
        resumed = dict(partitions.local_state(engine, rank=world.rank))
        differing = sorted(key for key in unbroken if not torch.equal(unbroken[key], resumed[key]))
        found.append({"differing": differing, "keys": resumed.keys() == unbroken.keys(), "same_record": ranks.to_json() == record})
        engine.close()
    distributed.stop()
    return found


def go_on_alone(folder: str) -> list[dict[str, Any]]:
    from megamm.engine import distributed

    world = distributed.start(timeout_seconds=300)
    found = [go_on_from(Path(folder) / f"step_{num_done:08d}", num_done, world) for num_done in SAVED]
    distributed.stop()
    return found


def go_on_from(path: Path, num_done: int, world: Any) -> dict[str, Any]:
    """From a checkpoint of two ranks: its state as it is, and how many triplets are left at the end."""
    from megamm.checkpoint.load import load
    from megamm.engine import partitions
    from tests.support.checkpoints import whole_state

    engine, ranks = build(world, Engine(precision="bf16", overrides=NOTHING_STAYS_GATHERED))
    ranks.restore(load(path, engine, world).data_state["ranks"])
    stored = dict(whole_state(path))
    equal = all(torch.equal(tensor, stored[key]) for key, tensor in partitions.local_state(engine, rank=0))
    averaged = sum(int(tensor.count_nonzero()) for key, tensor in stored.items() if key.startswith(("sensitivity/", "uncertainty/")))
    for step in range(num_done + 1, NUM_STEPS + 1):
        train(engine, ranks, world, step)
    left = {name: value for name, value in partitions.full_tensors(engine) if name.endswith("lora_E")}
    engine.close()
    return {"equal": equal, "averaged": averaged, "mean_rank": sum(int(value.count_nonzero()) for value in left.values()) / len(left)}


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_a_resume_goes_on_bit_for_bit_and_on_other_ranks(tmp_path):
    for results in run_ranks(save_and_go_on, 2, str(tmp_path), timeout_seconds=560):
        assert results == [{"differing": [], "keys": True, "same_record": True}] * len(SAVED)
    (results,) = run_ranks(go_on_alone, 1, str(tmp_path), timeout_seconds=560)
    assert all(result["equal"] and result["mean_rank"] == ADAPTER.rank for result in results)
    # Averages serve until ranks are final.
    assert results[0]["averaged"] > 0 and results[1]["averaged"] == 0


@pytest.mark.parametrize("by_row", [True, False])
def test_the_penalty_has_the_gradient_of_its_norm(by_row):
    weight = torch.randn(5, 3, requires_grad=True)
    rows = weight if by_row else weight.T
    (rows @ rows.T - torch.eye(len(rows))).norm().backward()
    torch.testing.assert_close(orthogonality_gradient(weight.detach(), by_row=by_row), weight.grad, rtol=1e-5, atol=1e-6)
    # An orthogonal factor is at the minimum, where the norm has no slope.
    assert not orthogonality_gradient(torch.eye(4)[:3], by_row=True).any()


def test_a_budget_that_cannot_be_followed_is_refused():
    with pytest.raises(ConfigError, match=re.escape("adapter.budget.initial_rank=4 is less than adapter.rank=5")):
        check_budget(Adapter(method="adalora", rank=5, budget=BUDGET), 100)
    with pytest.raises(ConfigError, match=re.escape("leave none of train.steps=5 for ranks to fall in")):
        check_budget(ADAPTER, 5)
    check_budget(ADAPTER, 6)
    check_budget(Adapter(method="lora", rank=5, budget=BUDGET), 5)


@pytest.mark.parametrize("saved", [{}, {"step": "x", "num_kept": 0, "kept": None}, {"step": 1, "num_kept": 1, "kept": {"other": "1"}}])
def test_a_record_of_something_else_is_refused(saved):
    model = MegaMMForConditionalGeneration(adapted_config())
    ranks = RankAllocator.__new__(RankAllocator)
    ranks._layers, ranks._first_total = dict(triplet_layers(model)), 0
    with pytest.raises(CheckpointError, match="the record of AdaLoRA's ranks cannot be read"):
        ranks.restore({"unknown": 1, **saved})
