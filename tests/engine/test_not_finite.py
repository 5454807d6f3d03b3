"""What the engine does with a gradient or a loss that is not finite on one rank alone: nothing, on all ranks."""

from __future__ import annotations

import math

import pytest
import torch

from megamm.config.schema import Batching, Engine, Optimizer
from tests.support.models import NOTHING_STAYS_GATHERED, small_decoder, start_engine, token_batch
from tests.support.ranks import run_ranks

BAD_STEP = 2
OFFLOAD = {"zero_optimization.offload_optimizer.device": "cpu"}
CASES = {
    "bf16, a loss that is no number": ("bf16", 1.0, {}, "loss"),
    "fp32, an infinite loss whose gradient is finite": ("fp32", 1.0, {}, "infinite loss"),
    "bf16, a gradient without clipping": ("bf16", 0.0, {}, "gradient"),
    "fp32, a gradient, the optimizer offloaded": ("fp32", 1.0, OFFLOAD, "gradient"),
}


class _Broken(torch.autograd.Function):
    """The loss as it is, with a gradient that is no number."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


BREAK = {
    "": lambda loss: loss,
    "loss": lambda loss: loss * math.nan,
    "infinite loss": lambda loss: loss + math.inf,
    "gradient": _Broken.apply,
}


def check_all() -> dict[str, dict]:
    from megamm.engine import distributed

    world = distributed.start()
    found = {name: check(world, *case) for name, case in CASES.items()}
    distributed.stop()
    return found


def check(world, precision: str, max_grad_norm: float, overrides: dict, what: str) -> dict:
    """Train with one bad micro-step of rank 1 in the middle, and without that step at all."""
    from megamm.engine import partitions, settings, weights

    def build():
        engine = Engine(precision=precision, overrides=NOTHING_STAYS_GATHERED | overrides)
        optim = Optimizer(max_grad_norm=max_grad_norm)
        ds_config = settings.deepspeed_config(engine, batch=Batching(), optim=optim, world_size=world.size, accumulation=2)
        return start_engine(weights.partitioned(small_decoder, ds_config, seed=0).train(), ds_config)

    def step(engine, number, what=""):
        for micro_step, rows in enumerate(token_batch(number)[world.rank :: world.size].split(2)):
            loss = engine(input_ids=rows, labels=rows, use_cache=False).loss * len(rows)
            is_bad = world.rank == 1 and micro_step == 0
            engine.backward(BREAK[what if is_bad else ""](loss), 1 / 6)
        return engine.step()

    def copy(engine):
        return {name: tensor.clone() for name, tensor in dict(partitions.local_state(engine, rank=world.rank)).items()}

    broken, clean = build(), build()
    applied = [step(broken, number, what if number == BAD_STEP else "") for number in range(BAD_STEP + 1)]
    norm, after = broken.grad_norm, copy(broken)
    for number in range(BAD_STEP):
        step(clean, number)
    state, rates = copy(clean), clean.learning_rates
    same = all(torch.equal(after[name], tensor) for name, tensor in state.items()) and broken.learning_rates == rates
    for number in (3, 4):
        applied += [step(broken, number), step(clean, number)]
    end, expected = copy(broken), copy(clean)
    went_on = all(torch.equal(end[name], tensor) for name, tensor in expected.items())
    finite = all(bool(tensor.isfinite().all()) for tensor in end.values())
    moved = any(not torch.equal(state[name], tensor) for name, tensor in expected.items())
    for engine in (broken, clean):
        engine.close()
    return {"applied": applied, "norm": str(norm), "same": same, "went_on": went_on, "finite": finite, "moved": moved}


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_what_is_not_finite_on_one_rank_changes_nothing_on_any():
    for found in run_ranks(check_all, 2, timeout_seconds=500):
        for name, result in found.items():
            assert result["applied"] == [True, True, False, True, True, True, True], name
            assert result == {"applied": result["applied"], "norm": "inf", "same": True, "went_on": True, "finite": True, "moved": True}, (
                name
            )
