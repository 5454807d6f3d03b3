"""Where ZeRO-3 keeps a training state: every parameter split over all ranks, masters and moments in flat sub-groups.

A rank's slices are those of `weights.partition_bounds`. Sub-groups lie in memory, or on a drive (`offload_optimizer.device = nvme`), from
which one of them at a time is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megamm.engine.distributed import import_deepspeed
from megamm.engine.weights import partition_bounds


class SplitState:
    """The state of a ZeRO-3 engine, seen through DeepSpeed's optimizer; holds nothing of its own."""

    def __init__(self, runner: Any):
        self._optimizer = runner.optimizer

    def shape(self, param: Any) -> tuple[int, ...]:
        """Whole shape."""
        return tuple(param.ds_shape)

    def dtype(self, param: Any) -> torch.dtype:
        """Type of the stored weight."""
        return param.ds_tensor.dtype

    def bounds(self, param: nn.Parameter) -> tuple[int, int]:
        """Elements of the flattened parameter that this rank holds."""
        return partition_bounds(param)

    def masters(self) -> list[torch.Tensor]:
        """Flat float32 masters, a sub-group each; empty ones stand for those on a drive."""
        return self._optimizer.fp32_partitioned_groups_flat

    def fragments(self, kinds: tuple[str, ...], *, keep: bool) -> Iterator[tuple[nn.Parameter, list[torch.Tensor]]]:
        """Each trainable parameter with this rank's master and moments, padding of the last rank behind them.

        Args:
            kinds: Names of the moments.
            keep: What is written into the tensors stays; else they are only read.

        Yields:
            The parameter, and the flat master and moments, which are valid until the next one is asked for.
        """
        for number, params in enumerate(self._optimizer.fp16_groups):
            with self.in_memory(number, keep=keep):
                master = self._optimizer.fp32_partitioned_groups_flat[number]
                state = self._optimizer.optimizer.state[master]
                for param in params:
                    _, start, size = self._optimizer.grad_position[self._optimizer.get_param_id(param)]
                    yield param, [tensor.detach().narrow(0, start, size) for tensor in (master, *(state[kind] for kind in kinds))]

    def set_stored(self, param: Any, master: torch.Tensor) -> None:
        """The next forward gathers the stored weight, which DeepSpeed renews only after a step."""
        param.ds_tensor.copy_(master)

    def gradient(self, param: Any) -> torch.Tensor:
        """A copy of what this rank holds of the step's gradient, in the type that it is summed in."""
        start, stop = partition_bounds(param)
        return import_deepspeed().utils.safe_get_local_grad(param)[: stop - start].clone()

    def add_to_gradient(self, param: Any, addition: torch.Tensor) -> None:
        """Add to what this rank holds of the step's gradient."""
        utils = import_deepspeed().utils
        gradient = utils.safe_get_local_grad(param).clone()
        gradient[: addition.numel()] += addition
        utils.safe_set_local_grad(param, gradient)

    def frozen_slice(self, param: Any) -> torch.Tensor:
        """This rank's elements of a frozen parameter."""
        start, stop = partition_bounds(param)
        return param.ds_tensor[: stop - start]

    def set_frozen(self, param: Any, read: Callable[[int, int], torch.Tensor]) -> None:
        """Fill what this rank holds of a frozen parameter from `read(start, stop)`."""
        start, stop = partition_bounds(param)
        param.ds_tensor[: stop - start].copy_(read(start, stop))

    def whole(self, param: Any) -> torch.Tensor:
        """The whole parameter, float32; a collective."""
        deepspeed = import_deepspeed()
        if param.requires_grad:
            return deepspeed.utils.safe_get_full_fp32_param(param)
        with deepspeed.zero.GatheredParameters([param]):
            return param.data.detach().float().clone()

    def renew(self, params: list[Any]) -> None:
        """Drop every gathered copy of old weights; those that DeepSpeed keeps whole are gathered anew. A collective."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for param in params:
            if getattr(param, "ds_secondary_tensor", None) is not None:
                # The copy inside a node (hpZ) is made again at the next gathering.
                param.ds_secondary_tensor = None
        stale = [param for param in params if param.ds_status == ZeroParamStatus.AVAILABLE]
        if stale:
            stale[0].partition(stale)
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    @contextmanager
    def in_memory(self, number: int, *, keep: bool) -> Iterator[None]:
        """Fetch a sub-group that lies on a drive, once for all of its parameters.

        Args:
            number: Which of `masters`.
            keep: What is written into its tensors stays, and so do moments that are made inside; else they are only read.
        """
        optimizer = self._optimizer
        if not optimizer._swappable_optimizer_subgroup(number):
            yield
            return
        optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if keep:
            optimizer._optimizer_states_and_gradient_swap_out(number)
        else:
            optimizer._release_swap_buffers(number)
