"""Parameters that somebody follows while they train: their gradients, masters and averages, as far as this rank holds them.

All are flat slices with the bounds of `partitions.local_state`, padding left out. What is followed is meant to be small, such as an
adapter: all of it is copied, to where the model computes, wherever its masters lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from megamm.engine.distributed import import_deepspeed
from megamm.engine.partitions import AVERAGES, state_of
from megamm.engine.runtime import Engine


def follow(engine: Engine, names: Iterable[str]) -> None:
    """Keep averages of parameters, zeros at first, beside their weights and moments: checkpoints hold them from now on.

    Args:
        engine: Every rank calls it, before anything is saved or loaded.
        names: Of trainable parameters.
    """
    state = state_of(engine)
    for name, param in _named(engine, names):
        start, stop = state.bounds(param)
        for kind in AVERAGES:
            engine.averages[f"{kind}/{name}"] = torch.zeros(stop - start, device=param.device)


def bounds(engine: Engine, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Elements of each flattened parameter that this rank holds."""
    state = state_of(engine)
    return {name: state.bounds(param) for name, param in _named(engine, names)}


def gradients(engine: Engine, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """float32 copies of the step's gradient, between the last backward and the step; fp16's loss scale is taken out."""
    state = state_of(engine)
    return {name: state.gradient(param).to(param.device, torch.float32) / engine.loss_scale for name, param in _named(engine, names)}


def add_to_gradients(engine: Engine, additions: Mapping[str, torch.Tensor]) -> None:
    """Add whole tensors, the same on every rank, to the step's gradient, between the last backward and the step."""
    state = state_of(engine)
    for name, param in _named(engine, additions):
        start, stop = state.bounds(param)
        state.add_to_gradient(param, additions[name].reshape(-1)[start:stop] * engine.loss_scale)


def masters(engine: Engine, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """float32 copies of the weights."""
    params = dict(_named(engine, names))
    wanted = {id(param): name for name, param in params.items()}
    state = state_of(engine)
    # Lower stages name only what this rank holds.
    found = {name: torch.zeros(0, device=param.device) for name, param in params.items()}
    for param, (master,) in state.fragments((), keep=False):
        if id(param) in wanted:
            start, stop = state.bounds(param)
            found[wanted[id(param)]] = master[: stop - start].to(param.device, copy=True)
    return found


@contextmanager
def whole(engine: Engine, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The stored weights whole, to be read inside. A collective, one for all of them."""
    params = dict(_named(engine, names))
    if engine.zero_stage < 3:
        yield {name: param.detach() for name, param in params.items()}
        return
    with import_deepspeed().zero.GatheredParameters(list(params.values())):
        yield {name: param.detach() for name, param in params.items()}


@torch.no_grad()
def set_to_zero(engine: Engine, where: Mapping[str, torch.Tensor]) -> None:
    """Make elements of weights zero, masters included; moments stay. A collective.

    Args:
        engine: Between two steps.
        where: Name -> bool of the whole flattened parameter, the same on every rank.
    """
    wanted = {id(param): name for name, param in _named(engine, where)}
    state = state_of(engine)
    for param, (master,) in state.fragments((), keep=True):
        if id(param) in wanted:
            start, stop = state.bounds(param)
            master[: stop - start].masked_fill_(where[wanted[id(param)]][start:stop].to(master.device), 0.0)
            state.set_stored(param, master)
    state.renew([param for _, param in _named(engine, where)])


def _named(engine: Engine, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """In the model's order, so that collectives meet."""
    wanted = set(names)
    return ((name, param) for name, param in engine.module.named_parameters() if name in wanted)
