"""Checkpoints in the real format without an engine, for tests of what happens to files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import Slices
from megamm.checkpoint.manifest import DATA_STATE, LEDGER, MANIFEST, Manifest, ParameterEntry, rank_file, step_folder, verify
from megamm.checkpoint.saver import Committed, Saver
from megamm.checkpoint.shards import write_file, write_shard
from megamm.checkpoint.slicing import slice_bounds
from megamm.config.schema import Checkpointing
from megamm.engine.distributed import World
from megamm.engine.runtime import Engine


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    num_ranks: int = 2,
    fill: float = 0.0,
    buffers: dict[str, torch.Tensor] | None = None,
    random: dict[str, torch.Tensor] | None = None,
    fingerprints: dict[str, str] | None = None,
) -> Path:
    """Commit `tensors` (trainable) and `buffers` (None for one, `steps_seen`) as `num_ranks` ranks would; moments are `fill`."""
    buffers = {"steps_seen": torch.tensor([step])} if buffers is None else buffers
    path = folder / step_folder(step)
    path.mkdir(parents=True)
    files = {}
    for rank in range(num_ranks):
        state = {}
        for name, tensor in tensors.items():
            start, stop = slice_bounds(tensor.numel(), num_ranks, rank)
            state[f"weight/{name}"] = tensor.reshape(-1)[start:stop]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}/{name}"] = torch.full((stop - start,), fill)
        # As every rank's own: plus its number.
        state |= {name: tensor + rank for name, tensor in (random or {}).items()}
        if rank == 0:
            state |= {f"buffer/{name}": tensor.reshape(-1) for name, tensor in buffers.items()}
        files[rank_file(rank)] = write_shard(path / rank_file(rank), state)
    files[DATA_STATE] = write_file(path / DATA_STATE, [b'{"row":3}'])
    files[LEDGER] = write_file(path / LEDGER, [b'{"key":"a"}\n{"key":"b"}\n'])
    parameters = [ParameterEntry(name, tuple(tensor.shape), "bfloat16", "trainable") for name, tensor in tensors.items()]
    parameters += [ParameterEntry(name, tuple(tensor.shape), str(tensor.dtype)[6:], "buffer") for name, tensor in buffers.items()]
    manifest = Manifest(
        step=step, world_size=num_ranks, files=files, parameters=tuple(parameters), engine={}, fingerprints=fingerprints or {}
    )
    write_file(path / MANIFEST, [manifest.to_text().encode()])
    return path


def whole_state(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every flat tensor of a checkpoint that verifies, whole."""
    manifest = verify(folder)
    with Slices(folder, manifest) as slices:
        for key in sorted(slices.keys()):
            yield key, slices.read(key, 0, slices.num_elements(key.partition("/")[2]))


def shard_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """A shard as it would lie on the disk."""
    return safetensors.torch.save(tensors)


def some_tensors() -> dict[str, torch.Tensor]:
    """Sizes that ranks do not divide: a matrix, a vector, a scalar's worth."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"a.weight": (3, 7), "a.bias": (5,), "b.scale": (1,)}.items()}


def save(folder: Path, engine: Engine, world: World, progress: Progress) -> Path:
    """Commit one checkpoint of an engine while training waits."""
    settings = Checkpointing(asynchronous=False, keep_last=1000, max_failures=1)
    with Saver(folder, engine, world, settings) as saver:
        saver.save(progress)
        (outcome,) = saver.finish()
    assert isinstance(outcome, Committed)
    return outcome.folder
