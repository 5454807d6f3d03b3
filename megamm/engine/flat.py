"""Where ZeRO-1 and ZeRO-2 keep a training state: whole weights on every rank, masters and moments cut from one flat vector a group.

The parameters of a group lie one after the other in that vector, and each rank holds one stretch of it: the middle of a
parameter on this rank, none of it on the next. Frozen parameters are whole on every rank; each rank answers for an even share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megamm.engine.distributed import import_deepspeed


class FlatState:
    """The state of a ZeRO-1 or ZeRO-2 engine, seen through DeepSpeed's optimizer; holds nothing of its own."""

    def __init__(self, runner: Any):
        self._optimizer = runner.optimizer
        # ZeRO-1 in bf16 is a class of its own in DeepSpeed, which names the same things otherwise.
        self._is_bf16_only = hasattr(runner.optimizer, "fp32_groups_flat_partition")

    def shape(self, param: nn.Parameter) -> tuple[int, ...]:
        """Whole shape."""
        return tuple(param.shape)

    def dtype(self, param: nn.Parameter) -> torch.dtype:
        """Type of the stored weight."""
        return param.dtype

    def bounds(self, param: Any) -> tuple[int, int]:
        """Elements of the flattened parameter whose master and moments this rank holds, or that it answers for where it is frozen."""
        if not param.requires_grad:
            size = -(-param.numel() // dist.get_world_size())
            start = min(size * dist.get_rank(), param.numel())
            return start, min(start + size, param.numel())
        if param._hp_mapping is None:
            return 0, 0
        place = param._hp_mapping.lp_fragment_address
        return place.start, place.start + place.numel

    def masters(self) -> list[torch.Tensor]:
        """Flat float32 masters, a parameter group each."""
        return self._optimizer.fp32_groups_flat_partition if self._is_bf16_only else self._optimizer.single_partition_of_fp32_groups

    def in_memory(self, number: int, *, keep: bool) -> AbstractContextManager[None]:
        """Nothing to fetch: lower stages keep their state in memory."""
        return nullcontext()

    def fragments(self, kinds: tuple[str, ...], *, keep: bool) -> Iterator[tuple[nn.Parameter, list[torch.Tensor]]]:
        """Each trainable parameter of which this rank holds something, with that part of master and moments; changes stay.

        Args:
            kinds: Names of the moments.
            keep: Of no consequence here: everything lies in memory.
        """
        groups = self._optimizer.bf16_groups if self._is_bf16_only else self._optimizer.bit16_groups
        for params, master in zip(groups, self.masters(), strict=True):
            state = self._optimizer.optimizer.state[master]
            for param in params:
                if param._hp_mapping is not None:
                    place = param._hp_mapping.get_hp_fragment_address()
                    tensors = (master, *(state[kind] for kind in kinds))
                    yield param, [tensor.detach().narrow(0, place.start, place.numel) for tensor in tensors]

    def set_stored(self, param: nn.Parameter, master: torch.Tensor) -> None:
        """Nothing yet: `renew` makes all stored weights from the masters at once."""

    def gradient(self, param: Any) -> torch.Tensor:
        """A copy of what this rank holds of the step's gradient, in the type that it is summed in."""
        return param.new_empty(0) if param._hp_mapping is None else self._gradient_fragment(param).clone()

    def add_to_gradient(self, param: Any, addition: torch.Tensor) -> None:
        """Add to what this rank holds of the step's gradient."""
        if param._hp_mapping is not None:
            fragment = self._gradient_fragment(param)
            fragment.add_(addition.to(fragment.device))

    def _gradient_fragment(self, param: Any) -> torch.Tensor:
        flat = param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group).view(-1)
        place = param._hp_mapping.lp_fragment_address
        # ZeRO-1 in bf16 keeps the whole gradient on every rank.
        return flat.narrow(0, place.start, place.numel) if flat.numel() == param.numel() else flat[: place.numel]

    def frozen_slice(self, param: nn.Parameter) -> torch.Tensor:
        """The elements of a frozen parameter that this rank answers for."""
        start, stop = self.bounds(param)
        return param.detach().reshape(-1)[start:stop]

    def set_frozen(self, param: nn.Parameter, read: Callable[[int, int], torch.Tensor]) -> None:
        """Fill a frozen parameter, which is whole on every rank, from `read(start, stop)`."""
        param.copy_(read(0, param.numel()).reshape(param.shape))

    def whole(self, param: nn.Parameter) -> torch.Tensor:
        """The whole parameter, float32; a collective."""
        if param.requires_grad:
            return import_deepspeed().utils.safe_get_full_fp32_param(param)
        return param.detach().float().clone()

    def renew(self, params: list[nn.Parameter]) -> None:
        """Round the masters into the stored weights and gather these, as after a step. A collective."""
        self._optimizer.update_lp_params()
