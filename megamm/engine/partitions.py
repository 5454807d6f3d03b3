"""What one rank holds of a training state: read out, and put back so that training continues bit for bit.

Every parameter is seen as a flat vector of which this rank holds one contiguous slice, rank after rank; padding is never
shown. Slices are named by kind and parameter:

    weight/NAME       float32 master of a trainable parameter, or the stored weight of a frozen one
    exp_avg/NAME      AdamW's first moment
    exp_avg_sq/NAME   AdamW's second moment
    sensitivity/NAME  of parameters that are followed (`followed`): what somebody averages of them, and `uncertainty/NAME` likewise
    buffer/NAME       a persistent buffer, whole, on rank 0 only (buffers are equal on all ranks)

So a state of N ranks becomes one of M ranks by slicing and nothing else. Which slices a rank holds depends on the ZeRO stage: `split`
is stage 3, `flat` are stages 1 and 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamm.core.errors import CheckpointError
from megamm.engine.distributed import fail_together
from megamm.engine.flat import FlatState
from megamm.engine.runtime import Engine
from megamm.engine.split import SplitState

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGES = ("sensitivity", "uncertainty")
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
        kind: `trainable`, `followed` (trainable as well, with averages of its own), `frozen` or `buffer`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


def parameter_table(engine: Engine) -> list[ParameterFacts]:
    """The model's parameters in their order, then its persistent buffers; the same on every rank."""
    state = state_of(engine)

    def kind(name: str, param: nn.Parameter) -> str:
        if f"{AVERAGES[0]}/{name}" in engine.averages:
            return "followed"
        return "trainable" if param.requires_grad else "frozen"

    table = [
        ParameterFacts(name, state.shape(param), _dtype_name(state.dtype(param)), kind(name, param))
        for name, param in engine.module.named_parameters()
    ]
    table += [ParameterFacts(name, tuple(tensor.shape), _dtype_name(tensor.dtype), "buffer") for name, tensor in _buffers(engine)]
    return table


def uneven_slices(engine: Engine) -> dict[str, tuple[int, int]]:
    """First and one past the last element of each trainable parameter that this rank holds, where ranks do not hold even slices.

    Empty under ZeRO-3, whose slices are arithmetic. Lower stages cut whole groups of parameters, so that all ranks together
    name each parameter about once.
    """
    state = state_of(engine)
    if isinstance(state, SplitState):
        return {}
    bounds = {name: state.bounds(param) for name, param in engine.module.named_parameters() if param.requires_grad}
    return {name: (start, stop) for name, (start, stop) in bounds.items() if start < stop}


def local_state(engine: Engine, *, rank: int, with_frozen: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's slices, flat, with their keys: views of where they lie, or of a buffer for what lies on a drive.

    Copy or write each before the next is asked for, and all before the next step. Before the first step the moments are zeros.
    """
    _ensure_moments(engine)
    state = state_of(engine)
    names = {id(param): name for name, param in engine.module.named_parameters()}
    for param, tensors in state.fragments(MOMENTS, keep=False):
        start, stop = state.bounds(param)
        for kind, tensor in zip((WEIGHT, *MOMENTS), tensors, strict=True):
            yield f"{kind}/{names[id(param)]}", tensor[: stop - start]
        yield from ((key, engine.averages[key]) for kind in AVERAGES if (key := f"{kind}/{names[id(param)]}") in engine.averages)
    for name, param in engine.module.named_parameters():
        if with_frozen and not param.requires_grad:
            yield f"{WEIGHT}/{name}", state.frozen_slice(param)
    if rank == 0:
        yield from ((f"{BUFFER}/{name}", tensor.reshape(-1)) for name, tensor in _buffers(engine))


def load_local_state(engine: Engine, read: ReadSlice, counters: dict[str, Any], *, with_frozen: bool = True) -> None:
    """Fill this rank's slices and the counters; every rank calls it.

    Args:
        engine: Built with the model and settings that it goes on with; any number of ranks and any stage.
        read: Gives the slices that this rank asks for, one after the other.
        counters: From `counters` when the state was read out.
        with_frozen: False leaves frozen parameters as they are.
    """
    _ensure_moments(engine)
    state = state_of(engine)
    names = {id(param): name for name, param in engine.module.named_parameters()}
    # Nothing in it waits for another rank until the end.
    with fail_together(), torch.no_grad():
        for param, tensors in state.fragments(MOMENTS, keep=True):
            start, stop = state.bounds(param)
            for kind, tensor in zip((WEIGHT, *MOMENTS), tensors, strict=True):
                tensor[: stop - start].copy_(read(f"{kind}/{names[id(param)]}", start, stop))
                tensor[stop - start :].zero_()
            state.set_stored(param, tensors[0])
            for key in (f"{kind}/{names[id(param)]}" for kind in AVERAGES):
                if key in engine.averages:
                    engine.averages[key].copy_(read(key, start, stop))
        for name, param in engine.module.named_parameters():
            if with_frozen and not param.requires_grad:
                state.set_frozen(param, functools.partial(read, f"{WEIGHT}/{name}"))
        for name, buffer in _buffers(engine):
            buffer.copy_(read(f"{BUFFER}/{name}", 0, buffer.numel()).reshape(buffer.shape))
    state.renew(list(engine.module.parameters()))
    _set_counters(engine, counters)


def counters(engine: Engine) -> dict[str, Any]:
    """The engine's plain numbers, as JSON: applied and skipped steps, fp16's loss scale."""
    runner = engine.deepspeed
    scaler = getattr(runner.optimizer, "loss_scaler", None)
    # Scales that never change are a setting, and not every stage has one.
    names = [name for name in _LOSS_SCALER_STATE if hasattr(scaler, name)] if getattr(scaler, "dynamic", False) else []
    return {
        "num_applied_steps": engine.num_applied_steps,
        "num_skipped_steps": runner.skipped_steps,
        "num_steps": runner.global_steps,
        "loss_scaler": {name: getattr(scaler, name) for name in names},
    }


def full_tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter whole and float32, one at a time, then the persistent buffers as they are.

    A collective: every rank iterates to the end and gets the same tensors.
    """
    state = state_of(engine)
    for name, param in engine.module.named_parameters():
        yield name, state.whole(param)
    yield from _buffers(engine)


def state_of(engine: Engine) -> SplitState | FlatState:
    """Where this engine's ZeRO stage keeps its state, for this room only."""
    return SplitState(engine.deepspeed) if engine.zero_stage == 3 else FlatState(engine.deepspeed)


def _buffers(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent buffers in the order of the modules; each tensor once."""
    seen: set[int] = set()
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _ensure_moments(engine: Engine) -> None:
    """Give every flat master its AdamW state, which torch makes at the first step only."""
    optimizer = engine.deepspeed.optimizer.optimizer
    partitioned = state_of(engine)
    for number, master in enumerate(partitioned.masters()):
        state = optimizer.state[master]
        if not state:
            # A master on a drive has no elements before it is fetched, and its moments join it there.
            with partitioned.in_memory(number, keep=True):
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(master)


def _set_counters(engine: Engine, values: dict[str, Any]) -> None:
    runner = engine.deepspeed
    optimizer, scheduler = runner.optimizer, runner.lr_scheduler
    scaler = getattr(optimizer, "loss_scaler", None)
    for master in state_of(engine).masters():
        optimizer.optimizer.state[master]["step"].fill_(values["num_applied_steps"])
    runner.skipped_steps = values["num_skipped_steps"]
    runner.global_steps = values["num_steps"]
    runner.micro_steps = values["num_steps"] * engine.num_accumulation
    runner.global_samples = values["num_steps"] * runner.train_batch_size()
    for name, value in values["loss_scaler"].items():
        if not hasattr(scaler, name):
            raise CheckpointError(f"the checkpoint's loss scaler has {name}={value!r}, this run's has none; keep engine.precision")
        setattr(scaler, name, value)
    scheduler.last_epoch = values["num_applied_steps"]
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
