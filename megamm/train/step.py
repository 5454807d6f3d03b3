"""One optimizer step: the reduction that fixes the loss's scale, the micro-steps, the update.

The loss of a step is Σ w·nll / Σ w over the supervised tokens of the global batch: each micro-step's Σ w·nll is scaled by
1 / Σ w, and the engine sums over ranks and micro-steps. Where a head answers, nll is its loss of a sample. Bad samples have
left the batch before Σ w is taken: all micro-batches of a step are decoded before its first forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megamm.core.types import Batch
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.models.heads.targets import loss_scales
from megamm.models.inputs import batch_inputs
from megamm.train.build import Trainer


@dataclass(frozen=True, slots=True)
class GlobalCounts:
    """What all ranks together hold of one step.

    Attributes:
        weight_sum: Σ w over supervised tokens.
        task_weight_sums: The same a task, in the order of the task table.
        num_tokens: Real tokens.
        num_supervised: Supervised tokens.
        num_slots: Token places, padding included.
        num_skipped: Samples that entered the ledger instead of the batch, of each dataset that had some.
        waits_seconds: How long each rank waited for its data.
        num_failed: Ranks whose data could not be loaded.
        stop_requested: Whether any rank was asked to stop.
        flops: Model FLOPs of the real tokens, forward and backward.
    """

    weight_sum: float
    task_weight_sums: list[float]
    num_tokens: int
    num_supervised: int
    num_slots: int
    num_skipped: dict[str, int]
    waits_seconds: list[float]
    num_failed: int
    stop_requested: bool
    flops: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: Σ w·nll / Σ w over the global batch; 0 where nothing was supervised, not finite where some token's was not.
        task_losses: The same a task that had supervised tokens.
        grad_norm: L2 norm of the global gradient before clipping; inf when the update was not applied.
        learning_rates: Parameter group -> learning rate that this step used.
        not_applied: Why the weights stayed as they are: `loss` or `gradient` was not finite, or an `overflow` of fp16, which lowers
            its loss scale and means nothing else; empty where the update was applied. The same on all ranks, as all of the above.
        own_loss: The loss over this rank's part of the batch.
        suspects: `dataset/key` of this rank's samples whose own loss was not finite.
    """

    loss: float
    task_losses: dict[str, float]
    grad_norm: float
    learning_rates: dict[str, float]
    not_applied: str
    own_loss: float
    suspects: tuple[str, ...]

    @property
    def applied(self) -> bool:
        """Whether the weights changed."""
        return not self.not_applied


def count(
    batches: Sequence[Batch],
    *,
    skipped: Sequence[str],
    datasets: Sequence[str],
    tasks: Sequence[str],
    waited_seconds: float,
    flops: float,
    failed: bool,
    stop_requested: bool,
    world: World,
) -> GlobalCounts:
    """Sum the facts of a step over all ranks: the one reduction that every step makes before its first forward.

    It also carries what one rank must not keep to itself: that its data failed, or that it was asked to stop.

    Args:
        batches: This rank's micro-batches.
        skipped: Dataset of each sample that this rank answers for and did not deliver.
        datasets: Names of all datasets.
        tasks: The task table that `Batch.task_ids` index.
        waited_seconds: How long this rank waited for the batches.
        flops: Model FLOPs of the batches.
        failed: Whether the batches could not be loaded.
        stop_requested: Whether this rank was asked to stop.
        world: The ranks.
    """
    task_sums = np.zeros(len(tasks))
    for batch in batches:
        task_sums += _by_task(batch.task_ids, batch.weights, len(tasks))
    waits = [0.0] * world.size
    waits[world.rank] = waited_seconds
    facts = [
        sum(batch.weight_sum for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(int((batch.weights > 0).sum()) for batch in batches),
        sum(batch.input_ids.size for batch in batches),
        failed,
        stop_requested,
        flops,
    ]
    columns = (facts, task_sums, [skipped.count(name) for name in datasets], waits)
    total, *rest = _split(distributed.all_reduce_sum([float(one) for column in columns for one in column]), [len(one) for one in columns])
    task_weight_sums, num_skipped, waits_seconds = rest
    return GlobalCounts(
        weight_sum=total[0],
        num_tokens=int(total[1]),
        num_supervised=int(total[2]),
        num_slots=int(total[3]),
        num_failed=int(total[4]),
        stop_requested=total[5] > 0,
        flops=total[6],
        task_weight_sums=task_weight_sums,
        num_skipped={name: int(number) for name, number in zip(datasets, num_skipped, strict=True) if number},
        waits_seconds=waits_seconds,
    )


def train_step(trainer: Trainer, batches: Sequence[Batch], counts: GlobalCounts, *, world: World, tasks: Sequence[str]) -> StepResult:
    """Run all micro-steps of one step and update the weights.

    Args:
        trainer: The model under ZeRO.
        batches: This rank's micro-batches, one a micro-step, the same number on every rank.
        counts: From `count`.
        world: The ranks.
        tasks: The task table that `Batch.task_ids` index.
    """
    engine = trainer.engine
    may_overflow = engine.can_lower_loss_scale
    learning_rates = dict(zip(trainer.group_names, engine.learning_rates, strict=True))
    scale = 1.0 / counts.weight_sum if counts.weight_sum else 0.0
    scales = head_scales(batches)
    task_sums = np.zeros(len(tasks))
    suspects: list[str] = []
    for batch in batches:
        output = engine(**batch_inputs(batch, world.device, trainer.dtype, scales))
        engine.backward(output.loss, scale)
        losses = output.token_losses.float().cpu().numpy()
        task_sums += _task_loss_sums(losses, batch, len(tasks))
        suspects += _without_finite_loss(losses, batch)
    if trainer.ranks is not None:
        trainer.ranks.before_update()
    applied = engine.step()
    if trainer.ranks is not None:
        trainer.ranks.after_update(applied=applied)
    # One rank's norm for all: what is decided from it must be the same everywhere, to the last bit.
    *totals, grad_norm = distributed.all_reduce_sum([*task_sums, engine.grad_norm if world.is_main else 0.0])
    loss = sum(totals) / counts.weight_sum if counts.weight_sum else 0.0
    own_weight = sum(batch.weight_sum for batch in batches)
    return StepResult(
        loss=loss,
        task_losses=_means(totals, counts.task_weight_sums, tasks),
        grad_norm=grad_norm,
        learning_rates=learning_rates,
        not_applied="" if applied else why_not_applied(loss, may_overflow=may_overflow),
        own_loss=float(task_sums.sum()) / own_weight if own_weight else 0.0,
        suspects=tuple(suspects),
    )


def why_not_applied(loss: float, *, may_overflow: bool) -> str:
    """`loss`, `gradient` or `overflow`, as `StepResult.not_applied` says them.

    Args:
        loss: Of the global batch.
        may_overflow: Whether the loss scale could still fall when the step began.
    """
    if not math.isfinite(loss):
        return "loss"
    return "overflow" if may_overflow else "gradient"


def head_scales(batches: Sequence[Batch]) -> tuple[float, ...]:
    """What the parts of a head's losses are multiplied by, from the counts of all ranks; every rank calls it with as many micro-batches.

    Boxes, pixels or characters are counted over the global batch, so that the loss does not depend on which rank holds which; nothing is
    reduced where answers are in tokens.
    """
    targets = [batch.head for batch in batches if batch.head is not None]
    if not targets:
        return ()
    own = sum(one.weights.astype(np.float64) @ one.counts for one in targets)
    weight_sum, *counted = distributed.all_reduce_sum([sum(batch.weight_sum for batch in batches), *own.tolist()])
    return loss_scales(weight_sum, counted)


def held_out_loss(
    trainer: Trainer, batches: Iterable[Batch], *, world: World, tasks: Sequence[str], scales: Sequence[float] = ()
) -> dict[str, float]:
    """Loss over held-out micro-batches, without gradients; every rank brings the same number of them.

    Args:
        trainer: The model under ZeRO.
        batches: This rank's micro-batches.
        world: The ranks.
        tasks: The task table that `Batch.task_ids` index.
        scales: From `head_scales` of all the micro-batches.

    Returns:
        `loss` over everything and `loss/TASK` for each task with supervised tokens.
    """
    sums, weights = np.zeros(len(tasks)), np.zeros(len(tasks))
    with trainer.engine.evaluating():
        for batch in batches:
            output = trainer.engine(**batch_inputs(batch, world.device, trainer.dtype, scales))
            sums += _task_loss_sums(output.token_losses.float().cpu().numpy(), batch, len(tasks))
            weights += _by_task(batch.task_ids, batch.weights, len(tasks))
    totals = distributed.all_reduce_sum([*sums, *weights])
    sums_all, weights_all = totals[: len(tasks)], totals[len(tasks) :]
    result = {f"loss/{task}": loss for task, loss in _means(sums_all, weights_all, tasks).items()}
    if sum(weights_all):
        result["loss"] = sum(sums_all) / sum(weights_all)
    return result


def _split(values: Sequence[float], sizes: Sequence[int]) -> list[list[float]]:
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _task_loss_sums(token_losses: np.ndarray, batch: Batch, num_tasks: int) -> np.ndarray:
    """float64[tasks]: Σ w·nll a task."""
    return _by_task(batch.task_ids, token_losses.astype(np.float64) * batch.weights, num_tasks)


def _without_finite_loss(token_losses: np.ndarray, batch: Batch) -> list[str]:
    """`dataset/key` of the samples with a token whose loss is not finite."""
    found = []
    for row in np.flatnonzero(~np.isfinite(token_losses).all(axis=1)).tolist():
        ends = np.cumsum(batch.document_lengths[row])
        documents = np.searchsorted(ends, np.flatnonzero(~np.isfinite(token_losses[row])), side="right")
        found += [batch.keys[row][document] for document in np.unique(documents).tolist()]
    return found


def _by_task(task_ids: np.ndarray, values: np.ndarray, num_tasks: int) -> np.ndarray:
    real = task_ids >= 0
    return np.bincount(task_ids[real], weights=values[real].astype(np.float64), minlength=num_tasks)


def _means(sums: Sequence[float], weights: Sequence[float], tasks: Sequence[str]) -> dict[str, float]:
    return {task: total / weight for task, total, weight in zip(tasks, sums, weights, strict=True) if weight}
