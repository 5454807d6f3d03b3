"""A checkpoint back into an engine, written by any number of ranks and read by any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megamm.checkpoint import random_states
from megamm.checkpoint.base import Base
from megamm.checkpoint.manifest import Manifest, ParameterEntry, read_data_state, read_ledger, read_manifest
from megamm.checkpoint.slices import Slices
from megamm.core.errors import CheckpointError
from megamm.engine import partitions
from megamm.engine.distributed import World, fail_together
from megamm.engine.runtime import Engine


@dataclass(frozen=True, slots=True)
class Loaded:
    """What goes on after loading: the manifest, where the data plan stands, and the samples skipped so far."""

    manifest: Manifest
    data_state: dict[str, Any]
    ledger: list[dict[str, Any]]


def load(folder: Path, engine: Engine, world: World) -> Loaded:
    """Fill the engine from a verified checkpoint (`choose`); every rank calls it.

    At the world size that wrote it the random states return as well and training continues bit for bit. At another one, and
    after a re-shard, weights and moments are equal element by element, and the random states stay as they are.

    Raises:
        CheckpointError: It is of another model (names the first parameter that differs), on every rank.
    """
    manifest = read_manifest(folder)
    with fail_together():
        check_model(folder, manifest, parameter_entries(engine, manifest.base))
    with Slices(folder, manifest) as slices:
        # What lies in the base is in the engine already: a run loads it when it builds its model.
        partitions.load_local_state(engine, slices.read, manifest.engine, with_frozen=manifest.base is None)
        states = slices.random_states(world.rank) if manifest.world_size == world.size else {}
        if states:
            random_states.restore(states, world.device)
    return Loaded(manifest, read_data_state(folder), read_ledger(folder))


def parameter_entries(engine: Engine, base: Base | None) -> list[ParameterEntry]:
    """What a checkpoint of the engine says of its parameters: frozen ones lie in the base, where there is one."""
    entries = [ParameterEntry(**asdict(facts)) for facts in partitions.parameter_table(engine)]
    return [replace(entry, kind="base") if base is not None and entry.kind == "frozen" else entry for entry in entries]


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
