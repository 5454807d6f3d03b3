"""What one rank holds of a training state: read out, and put back so that training continues bit for bit.

Every parameter is seen as a flat vector of which this rank holds one contiguous slice, rank after rank; padding is never
shown. Slices are named by kind and parameter:

    weight/NAME       float32 master of a trainable parameter, or the stored weight of a frozen one
    exp_avg/NAME      AdamW's first moment
    exp_avg_sq/NAME   AdamW's second moment
    buffer/NAME       a persistent buffer, whole, on rank 0 only (buffers are equal on all ranks)

So a state of N ranks becomes one of M ranks by slicing and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamm.core.errors import CheckpointError, ConfigError
from megamm.engine.distributed import import_deepspeed
from megamm.engine.runtime import Engine
from megamm.engine.weights import partition_bounds

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
BUFFER = "buffer"
_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

ReadSlice = Callable[[str, int, int], torch.Tensor]
"""(key, start, stop) -> the elements [start, stop) of the flattened tensor of that key."""


@dataclass(frozen=True, slots=True)
class ParameterFacts:
    """One parameter or persistent buffer of the model.

    Attributes:
        name: Its first name in `named_parameters` (tied parameters count once) or its name in `state_dict`.
        shape: Whole shape.
        dtype: What the model stores, such as `bfloat16`; masters are float32.
        kind: `trainable`, `frozen` or `buffer`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


def parameter_table(engine: Engine) -> list[ParameterFacts]:
    """The model's parameters in their order, then its persistent buffers; the same on every rank."""
    table = [
        ParameterFacts(name, tuple(param.ds_shape), _dtype_name(param.ds_tensor.dtype), "trainable" if param.requires_grad else "frozen")
        for name, param in _named_parameters(engine)
    ]
    table += [ParameterFacts(name, tuple(tensor.shape), _dtype_name(tensor.dtype), "buffer") for name, tensor in _buffers(engine)]
    return table


def local_state(engine: Engine, *, rank: int) -> dict[str, torch.Tensor]:
    """This rank's slices, flat, as views where they lie in memory: copy or write them before the next step.

    Before the first step the moments are zeros.
    """
    _ensure_moments(engine)
    state: dict[str, torch.Tensor] = {}
    for name, param in _named_parameters(engine):
        start, stop = partition_bounds(param)
        if param.requires_grad:
            state[f"{WEIGHT}/{name}"] = _fragment(param, None)[: stop - start]
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = _fragment(param, moment)[: stop - start]
        else:
            state[f"{WEIGHT}/{name}"] = param.ds_tensor[: stop - start]
    if rank == 0:
        state |= {f"{BUFFER}/{name}": tensor.reshape(-1) for name, tensor in _buffers(engine)}
    return state


def load_local_state(engine: Engine, read: ReadSlice, counters: dict[str, Any]) -> None:
    """Fill this rank's slices and the counters; every rank calls it.

    Args:
        engine: Built with the model, stage and settings that it goes on with; any number of ranks.
        read: Gives the slices that this rank asks for, one after the other.
        counters: From `counters` when the state was read out.
    """
    _ensure_moments(engine)
    with torch.no_grad():
        for name, param in _named_parameters(engine):
            start, stop = partition_bounds(param)
            weight = _padded(read(f"{WEIGHT}/{name}", start, stop), param.ds_tensor.numel())
            if param.requires_grad:
                _set_fragment(param, weight, None)
                for moment in MOMENTS:
                    _set_fragment(param, _padded(read(f"{moment}/{name}", start, stop), param.ds_tensor.numel()), moment)
            # The stored weight too: the next forward gathers it, and DeepSpeed renews it only after a step.
            param.ds_tensor.copy_(weight)
        for name, buffer in _buffers(engine):
            buffer.copy_(read(f"{BUFFER}/{name}", 0, buffer.numel()).reshape(buffer.shape))
    _gather_again(engine)
    _set_counters(engine, counters)


def counters(engine: Engine) -> dict[str, Any]:
    """The engine's plain numbers, as JSON: applied and skipped steps, fp16's loss scale."""
    runner = engine.deepspeed
    scaler = runner.optimizer.loss_scaler
    return {
        "num_applied_steps": engine.num_applied_steps,
        "num_skipped_steps": runner.skipped_steps,
        "num_steps": runner.global_steps,
        "loss_scaler": {name: getattr(scaler, name) for name in _LOSS_SCALER_STATE if hasattr(scaler, name)},
    }


def full_tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter whole and float32, one at a time, then the persistent buffers as they are.

    A collective: every rank iterates to the end and gets the same tensors.
    """
    deepspeed = import_deepspeed()
    for name, param in _named_parameters(engine):
        if param.requires_grad:
            yield name, deepspeed.utils.safe_get_full_fp32_param(param)
        else:
            with deepspeed.zero.GatheredParameters([param]):
                whole = param.data.detach().float().clone()
            yield name, whole
    yield from _buffers(engine)


def require_partitioned(engine: Engine) -> None:
    """Refuse what this room cannot take apart.

    Raises:
        ConfigError: The engine does not run ZeRO-3.
    """
    if engine.zero_stage != 3:
        raise ConfigError(f"zero_optimization.stage={engine.zero_stage} has no checkpoints here; use a preset with stage 3")


def _named_parameters(engine: Engine) -> Iterator[tuple[str, Any]]:
    require_partitioned(engine)
    yield from engine.module.named_parameters()


def _buffers(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent buffers in the order of the modules; each tensor once."""
    seen: set[int] = set()
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _fragment(param: nn.Parameter, moment: str | None) -> torch.Tensor:
    utils = import_deepspeed().utils
    tensor = utils.safe_get_local_fp32_param(param) if moment is None else utils.safe_get_local_optimizer_state(param, moment)
    return tensor.view(-1)


def _set_fragment(param: nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
    utils = import_deepspeed().utils
    if moment is None:
        utils.safe_set_local_fp32_param(param, value)
    else:
        utils.safe_set_local_optimizer_state(param, value, moment)


def _padded(tensor: torch.Tensor, size: int) -> torch.Tensor:
    if tensor.numel() == size:
        return tensor
    result = tensor.new_zeros(size)
    result[: tensor.numel()] = tensor
    return result


def _ensure_moments(engine: Engine) -> None:
    """Give every flat master its AdamW state, which torch makes at the first step only."""
    optimizer = engine.deepspeed.optimizer
    for master in optimizer.fp32_partitioned_groups_flat:
        state = optimizer.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master)


def _gather_again(engine: Engine) -> None:
    """Drop every gathered copy of the old weights; those that DeepSpeed keeps whole are gathered anew."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    persistent = engine.deepspeed.optimizer.persistent_parameters
    stale = [param for _, param in _named_parameters(engine) if param.ds_status == ZeroParamStatus.AVAILABLE]
    if stale:
        stale[0].partition(stale)
    if persistent:
        persistent[0].all_gather(persistent)


def _set_counters(engine: Engine, values: dict[str, Any]) -> None:
    runner = engine.deepspeed
    optimizer, scheduler = runner.optimizer, runner.lr_scheduler
    for master in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[master]["step"].fill_(values["num_applied_steps"])
    runner.skipped_steps = values["num_skipped_steps"]
    runner.global_steps = values["num_steps"]
    runner.micro_steps = values["num_steps"] * engine.num_accumulation
    runner.global_samples = values["num_steps"] * runner.train_batch_size()
    for name, value in values["loss_scaler"].items():
        if not hasattr(optimizer.loss_scaler, name):
            raise CheckpointError(f"the checkpoint's loss scaler has {name}={value!r}, this run's has none; keep engine.precision")
        setattr(optimizer.loss_scaler, name, value)
    scheduler.last_epoch = values["num_applied_steps"]
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
