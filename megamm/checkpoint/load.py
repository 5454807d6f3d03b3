"""A checkpoint back into an engine, written by any number of ranks and read by any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamm.checkpoint import random_states
from megamm.checkpoint.manifest import Manifest, ParameterEntry, rank_file, read_data_state, read_ledger, read_manifest
from megamm.checkpoint.shards import DTYPES
from megamm.checkpoint.slicing import pieces, pieces_of
from megamm.core.errors import CheckpointError
from megamm.engine import partitions
from megamm.engine.distributed import World, fail_together
from megamm.engine.runtime import Engine

_KEYS = {"trainable": (partitions.WEIGHT, *partitions.MOMENTS), "frozen": (partitions.WEIGHT,), "buffer": (partitions.BUFFER,)}
"""Kind of a parameter -> what is stored of it."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What goes on after loading: the manifest, where the data plan stands, and the samples skipped so far."""

    manifest: Manifest
    data_state: dict[str, Any]
    ledger: list[dict[str, Any]]


class Slices:
    """The flat tensors of a checkpoint, read slice by slice wherever their elements lie.

    State: open memory-mapped files; a slice is all that is copied into memory.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._manifest = manifest
        self._num_elements = {entry.name: math.prod(entry.shape) for entry in manifest.parameters}
        self._buffers = {entry.name for entry in manifest.parameters if entry.kind == "buffer"}
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
        parts = [self._slice(rank, key)[first:last] for rank, first, last in self._pieces(key.partition("/")[2], start, stop)]
        if not parts:
            return torch.empty(0, dtype=self.dtype(key))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def random_states(self, rank: int) -> dict[str, torch.Tensor]:
        """What `random_states.capture` gave on that rank."""
        file = self._file(rank)
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(random_states.PREFIX)}  # noqa: SIM118

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


def load(folder: Path, engine: Engine, world: World) -> Loaded:
    """Fill the engine from a verified checkpoint (`choose`); every rank calls it.

    At the world size that wrote it the random states return as well and training continues bit for bit. At another one, and
    after a re-shard, weights and moments are equal element by element, and the random states stay as they are.

    Raises:
        CheckpointError: It is of another model (names the first parameter that differs), on every rank.
    """
    manifest = read_manifest(folder)
    with fail_together():
        check_model(folder, manifest, [ParameterEntry(**asdict(facts)) for facts in partitions.parameter_table(engine)])
    with Slices(folder, manifest) as slices:
        partitions.load_local_state(engine, slices.read, manifest.engine)
        states = slices.random_states(world.rank) if manifest.world_size == world.size else {}
        if states:
            random_states.restore(states, world.device)
    return Loaded(manifest, read_data_state(folder), read_ledger(folder))


def check_model(folder: Path, manifest: Manifest, table: Sequence[ParameterEntry]) -> None:
    """Compare a checkpoint's parameters with a model's: names, shapes, and which of them train.

    Raises:
        CheckpointError: The first difference. Another stored precision is none: masters are float32.
    """
    theirs = {entry.name: entry for entry in manifest.parameters}
    for own in table:
        entry = theirs.pop(own.name, None)
        if entry is None:
            raise CheckpointError(f"checkpoint {folder} is of another model: it has no {own.name}; resume with the recipe that wrote it")
        if (entry.shape, entry.kind) != (own.shape, own.kind):
            raise CheckpointError(
                f"checkpoint {folder} is of another model: {own.name} is {entry.kind} {list(entry.shape)} there and {own.kind} "
                f"{list(own.shape)} here; resume with the recipe that wrote it"
            )
    if theirs:
        raise CheckpointError(f"checkpoint {folder} is of another model: {next(iter(theirs))} is not in this one; resume with its recipe")
