"""Tensors read slice by slice: those of a checkpoint, of the base that it stands on, of an exported folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megamm.checkpoint import random_states
from megamm.checkpoint.base import tensor_files, weight_files
from megamm.checkpoint.manifest import MANIFEST, Manifest, rank_file, read_manifest
from megamm.checkpoint.shards import DTYPES
from megamm.checkpoint.slicing import pieces, pieces_of
from megamm.core.errors import CheckpointError
from megamm.engine import partitions

_KEYS = {
    "trainable": (partitions.WEIGHT, *partitions.MOMENTS),
    "followed": (partitions.WEIGHT, *partitions.MOMENTS, *partitions.AVERAGES),
    "frozen": (partitions.WEIGHT,),
    "buffer": (partitions.BUFFER,),
    "base": (),
}
"""Kind of a parameter -> what is stored of it."""


class Slices:
    """The flat tensors of a checkpoint, read slice by slice wherever their elements lie, in its base as well.

    State: open memory-mapped files; a slice is all that is copied into memory.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._manifest = manifest
        self._num_elements = {entry.name: math.prod(entry.shape) for entry in manifest.parameters}
        self._buffers = {entry.name for entry in manifest.parameters if entry.kind == "buffer"}
        self._in_base = {entry.name for entry in manifest.parameters if entry.kind == "base"}
        self._base: WeightSource | None = None
        self._files: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Slices:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def keys(self) -> list[str]:
        """`KIND/NAME` of all flat tensors."""
        return [f"{kind}/{entry.name}" for entry in self._manifest.parameters for kind in _KEYS[entry.kind]]

    def num_elements(self, name: str) -> int:
        """Elements of a parameter or buffer."""
        return self._num_elements[name]

    def dtype(self, key: str) -> torch.dtype:
        """Type that `KIND/NAME` was saved in."""
        rank, *_ = self._pieces(key.partition("/")[2], 0, 1)[0]
        return DTYPES[self._slice(rank, key).get_dtype()]

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor `KIND/NAME`, in the dtype it was saved in."""
        name = key.partition("/")[2]
        if name in self._in_base:
            return self._open_base().read(name, start, stop)
        parts = [self._slice(rank, key)[first:last] for rank, first, last in self._pieces(name, start, stop)]
        if not parts:
            return torch.empty(0, dtype=self.dtype(key))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def random_states(self, rank: int) -> dict[str, torch.Tensor]:
        """What `random_states.capture` gave on that rank."""
        file = self._file(rank)
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(random_states.PREFIX)}  # noqa: SIM118

    def _open_base(self) -> WeightSource:
        if self._base is None:
            assert self._manifest.base is not None, "a manifest with parameters of a base names it"
            self._base = self._stack.enter_context(open_weights(Path(self._manifest.base.path)))
        return self._base

    def _pieces(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        if name in self._buffers:
            return [(0, start, stop)]
        if name in self._manifest.slices:
            return pieces_of(start, stop, self._manifest.slices[name])
        return pieces(start, stop, num_elements=self._num_elements[name], num_ranks=self._manifest.world_size)

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            with _readable(self._folder, rank):
                self._files[rank] = self._stack.enter_context(safe_open(self._folder / rank_file(rank), framework="pt"))
        return self._files[rank]

    def _slice(self, rank: int, key: str) -> Any:
        file = self._file(rank)
        with _readable(self._folder, rank):
            return file.get_slice(key)


@contextmanager
def _readable(folder: Path, rank: int) -> Iterator[None]:
    """Name a file that is no shard, although its digest is right: whoever can write a manifest can vouch for anything."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder}: {rank_file(rank)} cannot be read ({error}); use another one") from error


class WeightSource(Protocol):
    """Whole weights by name, of which anybody reads the slices that he needs."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and persistent buffer."""
        ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""
        ...


@contextmanager
def open_weights(path: Path) -> Iterator[WeightSource]:
    """Open a checkpoint, or an exported folder, for its weights alone. Its files are taken as they are.

    Raises:
        CheckpointError: It is neither.
    """
    with ExitStack() as stack:
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            yield _CheckpointWeights(manifest, stack.enter_context(Slices(path, manifest)))
        else:
            yield _FolderWeights(path, stack)


class _CheckpointWeights:
    def __init__(self, manifest: Manifest, slices: Slices):
        self._entries = {entry.name: entry for entry in manifest.parameters}
        self._slices = slices

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        kind = partitions.BUFFER if self._entries[name].kind == "buffer" else partitions.WEIGHT
        return self._slices.read(f"{kind}/{name}", start, stop)


class _FolderWeights:
    """State: open memory-mapped files, of which only what is read comes into memory."""

    def __init__(self, folder: Path, stack: ExitStack):
        self._files: dict[str, Any] = {}
        try:
            opened = {name: stack.enter_context(safe_open(folder / name, framework="pt")) for name in weight_files(folder)}
            listed = tensor_files(folder)
            self._files = {name: opened[file] for name, file in listed.items()} or {
                name: file
                for file in opened.values()
                for name in file.keys()  # noqa: SIM118
            }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder} cannot be read ({error}); export the run again") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._files[name].get_tensor(name).reshape(-1)[start:stop]
