"""A checkpoint of N ranks rewritten as one of M, without an engine: for operators, and for file systems that like other sizes.

Resuming does not need it: loading takes any slice of any checkpoint. Both read through `Slices`, one slice at a time.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megamm.checkpoint.commit import Attempt, commit, write_files
from megamm.checkpoint.fence import Fence, newest_owner
from megamm.checkpoint.io import LOCAL, Buffer, Io
from megamm.checkpoint.manifest import DATA_STATE, LEDGER, FileFacts, Manifest, committed, rank_file, step_folder, verify
from megamm.checkpoint.shards import ShardLayout, Spec, tensor_bytes
from megamm.checkpoint.slices import Slices
from megamm.checkpoint.slicing import slice_bounds
from megamm.core.errors import CheckpointError


def reshard(source: Path, target: Path, world_size: int, *, num_threads: int = 1, io: Io = LOCAL) -> Path:
    """Write the state of `source` as `world_size` ranks would have, committed like any other checkpoint.

    Each thread holds one slice of one tensor in memory. Random states belong to ranks: they go along where the number of ranks
    stays, and are left out where it changes, as a resume at another number of ranks leaves them.

    Args:
        source: A checkpoint; it is verified first.
        target: A folder of checkpoints other than the source's, outside of the run that will `--resume` from it; must not hold this step.
        world_size: Ranks to write for.
        num_threads: Shards written at once.
        io: The file system.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: The source is missing or damaged, the target holds this step already, or the disk refused. Nothing is left then,
            nor after Ctrl-C.
    """
    manifest = verify(source)
    if any(step == manifest.step for step, _ in committed(target)):
        raise CheckpointError(f"{target} holds {step_folder(manifest.step)} already; name another folder")
    # Owner 0 owns nothing: this folder is nobody's, and the next owner of the target sweeps it away if this process is killed.
    attempt = Attempt(target, manifest.step, Fence(), os.getpid())
    # Under its owner's number in another run it would look like something abandoned there.
    written = dataclasses.replace(manifest.fence, number=newest_owner(target.parent))
    try:
        parts = _write_ranks(source, manifest, attempt, world_size, num_threads, io)
        small = {name: [(source / name).read_bytes()] for name in (DATA_STATE, LEDGER)}
        files = {name: facts for part in [*parts, write_files(attempt, small, io)] for name, facts in part.items()}
        commit(attempt, dataclasses.replace(manifest, world_size=world_size, files=files, fence=written, slices={}), io, lambda: None)
    except BaseException as error:
        shutil.rmtree(attempt.temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{attempt.final} was not written: {error}") from error
        raise
    return attempt.final


def _write_ranks(
    source: Path, manifest: Manifest, attempt: Attempt, world_size: int, num_threads: int, io: Io
) -> list[dict[str, FileFacts]]:
    """The shards of all ranks; where one fails, or somebody presses Ctrl-C, the others end with the tensor that they are at."""
    is_over = threading.Event()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            return list(pool.map(lambda rank: _write_rank(source, manifest, attempt, rank, world_size, io, is_over), range(world_size)))
        finally:
            is_over.set()


def _write_rank(
    source: Path, manifest: Manifest, attempt: Attempt, rank: int, world_size: int, io: Io, is_over: threading.Event
) -> dict[str, FileFacts]:
    with Slices(source, manifest) as slices:
        bounds = _bounds(manifest, slices, rank, world_size)
        specs = {key: Spec(slices.dtype(key), (stop - start,)) for key, (start, stop) in bounds.items()}
        states = slices.random_states(rank) if world_size == manifest.world_size else {}
        layout = ShardLayout(specs | {name: Spec.of(tensor) for name, tensor in states.items()})

        def blocks() -> Iterator[Buffer]:
            yield layout.header
            for key in layout.specs:
                if is_over.is_set():
                    raise CheckpointError(f"{attempt.final} is given up")
                yield tensor_bytes(states[key] if key in states else slices.read(key, *bounds[key]))

        return write_files(attempt, {rank_file(rank): blocks()}, io)


def _bounds(manifest: Manifest, slices: Slices, rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """Which elements of which flattened tensor a rank's shard holds: even slices, whatever the source's are, buffers on rank 0."""
    bounds = {}
    for key in slices.keys():  # noqa: SIM118
        kind, _, name = key.partition("/")
        num_elements = slices.num_elements(name)
        if kind != "buffer":
            bounds[key] = slice_bounds(num_elements, world_size, rank)
        elif rank == 0:
            bounds[key] = (0, num_elements)
    return bounds
