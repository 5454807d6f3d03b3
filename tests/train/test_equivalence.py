"""Two ranks compute what one computes: loss and gradients of the same global batch, through the real shards and engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm.config import Recipe
from tests.support.ranks import run_ranks
from tests.support.runs import corrupt_pictures, make_data, recipe_over

FP32 = ("--engine.precision=fp32", "--optim.max_grad_norm=0")
CASES = {
    "plain": (),
    "accumulation": ("--batch.micro_rows=1",),
    "task_weights": ("--loss.task_weights.speech_recognition=2.5", "--loss.task_weights.text=0.3"),
    "empty_rows": ("--batch.global_rows=5", "--batch.micro_rows=2"),
}


def two_steps(root: str, output: str, cases: dict[str, list[str]]) -> dict[str, Any]:
    """On each rank: the first two steps of every case; rank 0 writes the gradients of both to `output`."""
    from megamm.engine import distributed

    world = distributed.start(timeout_seconds=60)
    facts: dict[str, Any] = {}
    for case, overrides in cases.items():
        gradients = run_case(case, recipe_over(Path(root), *FP32, *overrides), world, facts)
        if world.is_main:
            save_file(gradients, f"{output}/{case}.safetensors")
    distributed.stop()
    return facts


def run_case(case: str, recipe: Recipe, world: Any, facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Train two steps; put what they did into `facts` and return their gradients."""
    from deepspeed.utils import safe_get_full_grad

    from megamm.train.build import build_trainer, load_tokenizer
    from megamm.train.data import TrainingData
    from megamm.train.step import count, train_step

    data = TrainingData.open(recipe, load_tokenizer(recipe), world)
    trainer = build_trainer(recipe, data.plan.tokenizer, world)
    gradients: dict[str, torch.Tensor] = {}
    apply = trainer.engine.step

    def step_keeping_gradients() -> bool:
        for name, param in trainer.engine.module.named_parameters():
            gradients[f"{len(facts)}/{name}"] = safe_get_full_grad(param)
        return apply()

    trainer.engine.step = step_keeping_gradients
    with data.loader(data.plan.start(), world) as loader:
        for number in range(2):
            step = next(loader)
            batches, skipped = step.micro_batches, [entry.dataset for entry in step.skipped]
            counts = count(
                batches,
                skipped=skipped,
                datasets=tuple(data.plan.datasets),
                tasks=data.tasks,
                waited_seconds=float(world.rank),
                flops=0,
                failed=False,
                stop_requested=False,
                world=world,
            )
            result = train_step(trainer, batches, counts, world=world, tasks=data.tasks)
            facts[f"{case}/{number}"] = {
                "loss": result.loss,
                "task_losses": result.task_losses,
                "keys": step.keys,
                "num_supervised": counts.num_supervised,
                "own_supervised": sum(int((batch.weights > 0).sum()) for batch in batches),
                "num_skipped": counts.num_skipped,
                "own_skipped": skipped,
                "waits_seconds": counts.waits_seconds,
                "micro_steps": len(batches),
            }
    trainer.engine.close()
    return gradients


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The cases on one rank and on two, over data in which some pictures are rotten."""
    root = tmp_path_factory.mktemp("data")
    make_data(root)
    corrupt_pictures(root / "pictures" / "train-00000.tar")
    results = {}
    for world_size in (1, 2):
        output = tmp_path_factory.mktemp(f"world{world_size}")
        results[world_size] = (run_ranks(two_steps, world_size, str(root), str(output), CASES, timeout_seconds=240), output)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_of_two_ranks_equal_one_rank(compared, case):
    (one,), folder_one = compared[1]
    two, folder_two = compared[2]
    for number in range(2):
        name = f"{case}/{number}"
        assert one[name]["keys"] == two[0][name]["keys"] == two[1][name]["keys"]
        assert two[0][name]["loss"] == two[1][name]["loss"] == pytest.approx(one[name]["loss"], rel=2e-6)
        assert two[0][name]["task_losses"] == pytest.approx(one[name]["task_losses"], rel=2e-6)
        assert two[0][name]["num_supervised"] == one[name]["num_supervised"]
    first, second = load_file(folder_one / f"{case}.safetensors"), load_file(folder_two / f"{case}.safetensors")
    assert first.keys() == second.keys() and len(first) > 50
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.distributed
def test_the_cases_are_what_they_claim(compared):
    """Unequal supervised tokens, a sample skipped on one rank only, several micro-steps: else the test above proves little."""
    two, _ = compared[2]
    names = list(two[0])
    assert any(two[0][name]["own_supervised"] != two[1][name]["own_supervised"] for name in names)
    assert any({len(two[0][name]["own_skipped"]), len(two[1][name]["own_skipped"])} == {0, 1} for name in names)
    assert all(Counter(two[0][name]["own_skipped"] + two[1][name]["own_skipped"]) == two[0][name]["num_skipped"] for name in names)
    assert all(two[0][name]["waits_seconds"] == two[1][name]["waits_seconds"] == [0.0, 1.0] for name in names)
    assert two[0]["accumulation/0"]["micro_steps"] == 3
