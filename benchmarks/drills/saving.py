"""A run without an engine: a known state, saved by ranks step by step as the saver saves it, and compared element by element."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megamm.checkpoint.commit import Attempt, commit, sweep, write_files
from megamm.checkpoint.fence import Fence
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.io import LOCAL, Buffer, Io
from megamm.checkpoint.load import Slices
from megamm.checkpoint.manifest import (
    DATA_STATE,
    LEDGER,
    FileFacts,
    Manifest,
    ParameterEntry,
    check_file,
    rank_file,
    read_data_state,
    read_ledger,
    read_manifest,
)
from megamm.checkpoint.retain import LATEST, point_latest, retire
from megamm.checkpoint.shards import ShardLayout, Spec, tensor_bytes
from megamm.checkpoint.slicing import slice_bounds
from megamm.config.schema import Checkpointing
from megamm.core.files import canonical_json
from megamm.engine.distributed import World, gather_json

# Sizes that no number of ranks divides, one that is smaller than most worlds.
SHAPES = {"embed.weight": (13, 7), "layer.weight": (11, 9), "norm.weight": (5,), "scale": (1,)}
PARAMETERS = (
    *(ParameterEntry(name, shape, "float32", "trainable") for name, shape in SHAPES.items()),
    ParameterEntry("num_seen", (3,), "int64", "buffer"),
)
NOBODY = Hold()


@dataclass(frozen=True)
class State:
    """All that a checkpoint holds, whole.

    Attributes:
        step: Optimizer steps.
        tensors: `KIND/NAME` -> flat tensor.
        data_state: Where the data plan stands.
        ledger: Skipped samples.
    """

    step: int
    tensors: Mapping[str, torch.Tensor]
    data_state: dict[str, Any] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)


def state_at(step: int, *, run: int = 0) -> State:
    """The state of a run after a step; another one for every step and run."""
    generator = torch.Generator().manual_seed(1_000_003 * run + step)
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    tensors = {f"{kind}/{name}": torch.randn(size, generator=generator) for name, size in sizes.items() for kind in kinds}
    tensors["buffer/num_seen"] = torch.tensor([step, run, 7])
    return State(step, tensors, {"row": step, "run": run}, [{"key": f"k{number}"} for number in range(step % 7)])


def files_of(state: State, rank: int, num_ranks: int) -> dict[str, list[Buffer]]:
    """What a rank writes: its slices, and on rank 0 the data state and the ledger."""
    own = {}
    for key, tensor in state.tensors.items():
        start, stop = slice_bounds(tensor.numel(), num_ranks, rank)
        if not key.startswith("buffer/"):
            own[key] = tensor[start:stop]
        elif rank == 0:
            own[key] = tensor
    layout = ShardLayout({key: Spec.of(tensor) for key, tensor in own.items()})
    files: dict[str, list[Buffer]] = {rank_file(rank): [layout.header, *(tensor_bytes(own[key]) for key in layout.specs)]}
    if rank == 0:
        files[DATA_STATE] = [canonical_json(state.data_state).encode()]
        files[LEDGER] = ["".join(canonical_json(entry) + "\n" for entry in state.ledger).encode()]
    return files


def manifest_of(state: State, num_ranks: int, files: Mapping[str, FileFacts], fence: Fence) -> Manifest:
    """The manifest over the files of all ranks."""
    return Manifest(step=state.step, world_size=num_ranks, files=dict(files), parameters=PARAMETERS, engine={}, fence=fence)


def save_together(run: Path, state: State, world: World, hold: Hold, *, io: Io = LOCAL, keep_last: int = 2, number: int = 1) -> None:
    """Save as the ranks of a job do, every rank in its process; `saver` says why in this order."""
    attempt = Attempt(run / "checkpoints", state.step, hold.fence, number)
    if world.is_main:
        sweep(attempt, io)
    own = write_files(attempt, files_of(state, world.rank, world.size), io)
    parts = gather_json({name: asdict(facts) for name, facts in own.items()})
    files = {name: FileFacts(**facts) for part in parts for name, facts in part.items()}
    if world.is_main:
        commit(attempt, manifest_of(state, world.size, files, hold.fence), io, hold.check)
    gather_json(None)
    for name in sorted(files)[(world.rank + 1) % world.size :: world.size]:
        check_file(attempt.final, name, files[name], from_disk=True)
    gather_json(None)
    if world.is_main:
        hold.check()
        point_latest(attempt.folder, attempt.final.name, io)
        retire(attempt.folder, state.step, Checkpointing(keep_last=keep_last), io)
    gather_json(None)


def save_alone(run: Path, state: State, num_ranks: int, *, hold: Hold = NOBODY, io: Io = LOCAL, keep_last: int = 2) -> Path:
    """The same files in the same order from one process, a rank after the other."""
    attempt = Attempt(run / "checkpoints", state.step, hold.fence, 1)
    sweep(attempt, io)
    files: dict[str, FileFacts] = {}
    for rank in range(num_ranks):
        files |= write_files(attempt, files_of(state, rank, num_ranks), io)
    commit(attempt, manifest_of(state, num_ranks, files, hold.fence), io, hold.check)
    retire(attempt.folder, state.step, Checkpointing(keep_last=keep_last), io)
    return attempt.final


def problem_with(folder: Path, expected: State, *, num_ranks: int = 1) -> str:
    """What a checkpoint read by `num_ranks` ranks gives that is not what was saved; empty for nothing."""
    manifest = read_manifest(folder)
    if manifest.step != expected.step:
        return f"{folder.name} holds step {manifest.step}"
    with Slices(folder, manifest) as slices:
        if set(slices.keys()) != set(expected.tensors):
            return f"{folder.name} holds other tensors"
        for key, tensor in expected.tensors.items():
            bounds = [slice_bounds(tensor.numel(), num_ranks, rank) for rank in range(num_ranks)]
            parts = [slices.read(key, *each) for each in bounds]
            if any(not torch.equal(part, tensor[start:stop]) for part, (start, stop) in zip(parts, bounds, strict=True)):
                return f"{folder.name}: {key} is not what was saved"
    truth = json.loads(canonical_json([expected.data_state, expected.ledger]))
    return "" if [read_data_state(folder), read_ledger(folder)] == truth else f"{folder.name}: the data state or the ledger is another one"


def names_in(run: Path) -> list[str]:
    """All that lies in the run's `checkpoints` folder, but the link to the latest."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != LATEST)


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of syncs would measure the disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="drill-", dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
