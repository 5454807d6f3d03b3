"""The training engine as the loop sees it: forward, backward, step, and what to log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from megamm.core.errors import MegaMMError
from megamm.engine.distributed import fail_together, import_deepspeed
from megamm.engine.drive import OwnFolder, open_drive


class Engine:
    """A model under DeepSpeed with torch's fused AdamW and a learning rate by optimizer step.

    State: the model's partitions, their float32 masters and moments, averages of parameters that are followed (`followed`), the
    number of applied steps (which decides the learning rate) and fp16's loss scale. `partitions` reads and writes all of it; what it
    restores continues bit for bit. Within a step also how many backwards it had: checkpoints lie between steps, where there are none.
    """

    def __init__(self, engine: Any, drive: OwnFolder | None = None):
        self._engine = engine
        self._drive = drive
        self._num_backwards = 0
        # KIND/NAME -> this rank's slice; whoever follows parameters fills it, and checkpoints keep it.
        self.averages: dict[str, torch.Tensor] = {}

    @property
    def module(self) -> nn.Module:
        """The model; its parameters are split, so read them through `partitions`."""
        return self._engine.module

    @property
    def deepspeed(self) -> Any:
        """The DeepSpeedEngine, for this room only."""
        return self._engine

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self._engine.zero_optimization_stage())

    @property
    def num_accumulation(self) -> int:
        """Micro-steps a step."""
        return self._engine.gradient_accumulation_steps()

    @property
    def num_applied_steps(self) -> int:
        """Optimizer steps that changed the weights; skipped ones do not count and do not move the learning rate."""
        return self._engine.lr_scheduler.last_epoch

    @property
    def learning_rates(self) -> list[float]:
        """Learning rate of the next step, a parameter group each."""
        return [group["lr"] for group in self._engine.optimizer.param_groups]

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping, over all ranks; inf when the step was not applied."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """fp16's dynamic loss scale; 1 at other precisions."""
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0))

    @property
    def can_lower_loss_scale(self) -> bool:
        """Whether a gradient that is not finite may have overflowed fp16 alone, so that a lower loss scale is tried next."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return bool(getattr(scaler, "dynamic", False)) and scaler.cur_scale > scaler.min_scale

    def __call__(self, **inputs: Any) -> Any:
        """Run the model's forward."""
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, scale: float) -> None:
        """Add to the step's gradient, which is the sum of `scale * loss` over all ranks and micro-steps.

        DeepSpeed averages over ranks; that is undone here, so the caller divides by what the loss means and nothing else.
        A loss that is not finite makes the gradient so, even where its own would be finite (that of an infinite loss may be): then
        no rank applies the step.

        Args:
            loss: Scalar with a graph, from this engine's forward.
            scale: Such as 1 / Σw of the global batch.

        Raises:
            MegaMMError: The step has had a backward for each of its micro-steps.
        """
        if self._num_backwards == self.num_accumulation:
            raise MegaMMError(f"backward after all {self.num_accumulation} micro-steps of a step; call step first")
        # Divided by the accumulation inside DeepSpeed as well unless told not to.
        nothing = loss.detach() * 0
        self._engine.backward(loss * (nothing + scale * self._engine.dp_world_size), scale_wrt_gas=False)
        self._num_backwards += 1
        if not self._engine.is_gradient_accumulation_boundary():
            # Counts the micro-step; the weights change at the boundary only.
            self._engine.step()

    def step(self) -> bool:
        """Clip, update the weights and the learning rate, after the last micro-step's backward.

        Returns:
            True when the weights changed; False, on all ranks alike, when the gradient was not finite on some rank: then weights,
            moments and learning rate stay as they are.

        Raises:
            MegaMMError: Fewer backward calls than micro-steps went before.
        """
        # DeepSpeed itself would take the step without the gradient of the last one.
        if self._num_backwards != self.num_accumulation:
            raise MegaMMError(f"step after {self._num_backwards} of {self.num_accumulation} micro-steps; call backward for each first")
        self._num_backwards = 0
        self._engine.step()
        return self._engine.was_step_applied()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside run in evaluation mode and build no graph; every rank must make the same number of them."""
        was_training = self.module.training
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train(was_training)

    @contextlib.contextmanager
    def on_drive(self) -> Iterator[None]:
        """A section at whose end, also by an error, nothing of this rank's is left on a drive; the engine cannot train afterwards.

        Files alone: no rank waits for another one, and DeepSpeed is not asked, because after an error its device may never answer.
        """
        try:
            yield
        finally:
            if self._drive is not None:
                self._drive.close()

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers, and what it has on a drive; the engine cannot be used afterwards."""
        self._engine.destroy()
        if self._drive is not None:
            self._drive.close()


def initialize(
    model: nn.Module, ds_config: dict[str, Any], param_groups: list[dict[str, Any]], lr_lambda: Callable[[int], float]
) -> Engine:
    """Put a model under DeepSpeed.

    Args:
        model: From `weights.partitioned`, in training mode, frozen parts with `requires_grad` False.
        ds_config: From `settings.deepspeed_config`, the one that the model was built with.
        param_groups: What `torch.optim.AdamW` takes: `params`, `lr`, `betas`, `eps`, `weight_decay` each.
        lr_lambda: Number of applied steps -> factor on each group's `lr`.

    Raises:
        ConfigError: The optimizer's state belongs on a drive that is not there or cannot be used, on some rank.
    """
    with fail_together():
        ds_config, drive = open_drive(ds_config)
    deepspeed = import_deepspeed()
    optimizer = torch.optim.AdamW(param_groups, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        config=ds_config,
        optimizer=optimizer,
        lr_scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, lr_lambda),
        dist_init_required=False,
    )
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):
        # Else DeepSpeed ends the run by a bare exception where the scale cannot fall further: the caller counts such steps.
        scaler.raise_error_at_min_scale = False
    return Engine(engine, drive)
