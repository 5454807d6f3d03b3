"""One rank's state in host memory, as its shard will lie on the disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megamm.checkpoint.io import Buffer
from megamm.checkpoint.shards import ShardLayout, Spec, tensor_bytes
from megamm.core.errors import MegaMMError
from megamm.core.logging import get_logger

_log = get_logger("checkpoint")


class Snapshot:
    """A copy of this rank's state that stays as it is while training goes on.

    State: one buffer of `num_bytes` in host memory, allocated and touched once, because copying into memory that is already
    there is about ten times as fast, and because a rank without room for it should fail at its start. What `take` copied is
    what `blocks` gives until the next `take`.

    Args:
        tensors: Names and tensors of the state, whose types and shapes every later one has.
        device: Where this rank computes; beside a GPU the buffer is page-locked, so that copies run at the bus's speed.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device):
        self._device = device
        self._layout = ShardLayout({name: Spec.of(tensor) for name, tensor in tensors})
        # Written to, not only reserved: the kernel would otherwise find the pages one by one during the first copy.
        self._data = torch.empty(self._layout.num_bytes, dtype=torch.uint8).fill_(0)
        self._is_locked = device.type == "cuda" and self._lock_pages()
        self._views = {
            name: self._data[start : start + self._layout.specs[name].num_bytes].view(self._layout.specs[name].dtype)
            for name, start in self._layout.starts.items()
        }

    @property
    def num_bytes(self) -> int:
        """Host memory that it holds, for memory reports."""
        return self._data.numel()

    def take(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the state, each tensor before the next is asked for; when this returns training may change it.

        Raises:
            MegaMMError: It is of other types and shapes than the one that the buffer was made for.
        """
        # Updates that run on other streams must end before the copies begin, and the copies before training goes on.
        self._wait()
        missing = set(self._views)
        for name, tensor in tensors:
            if Spec.of(tensor) != self._layout.specs.get(name):
                raise _changed(name)
            self._views[name].copy_(tensor.reshape(-1), non_blocking=self._is_locked)
            missing.remove(name)
        self._wait()
        if missing:
            raise _changed(min(missing))

    def blocks(self) -> list[Buffer]:
        """The bytes of the shard."""
        return [self._layout.header, tensor_bytes(self._data)]

    def close(self) -> None:
        """Give the page lock back."""
        if self._is_locked:
            _cudart().cudaHostUnregister(self._data.data_ptr())
            self._is_locked = False

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _lock_pages(self) -> bool:
        """Lock exactly these bytes; torch's own allocator of page-locked memory would round up to a power of two."""
        result = _cudart().cudaHostRegister(self._data.data_ptr(), self._data.numel(), 0)
        if int(result) != 0:
            _log.warning("%d bytes for snapshots cannot be page-locked (CUDA error %d): saving stalls longer", self.num_bytes, int(result))
        return int(result) == 0


def _changed(name: str) -> MegaMMError:
    return MegaMMError(f"{name} changed its type or shape since training began, or came or went; what is saved must keep its shape")


def _cudart() -> Any:
    return torch.cuda.cudart()
