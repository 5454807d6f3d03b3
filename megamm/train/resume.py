"""Where a run starts: at step 0, or after the newest checkpoint that verifies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.checkpoint.base import Base
from megamm.checkpoint.choose import newest_good, require_good
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.load import Loaded, load
from megamm.checkpoint.manifest import committed
from megamm.core.errors import CheckpointError
from megamm.core.logging import get_logger
from megamm.data.ledger import Skipped
from megamm.data.planning.state import LoaderState
from megamm.engine.distributed import World, fail_together
from megamm.engine.runtime import Engine
from megamm.train.rewinds import set_aside_abandoned, with_decisions
from megamm.train.run_folder import RunFolder

WATCH = "watch"
"""Where the state of the data in a checkpoint holds that of `SpikeWatch`: both say where the run stands between two steps."""
RANKS = "ranks"
"""Likewise, that of `RankAllocator`."""

_log = get_logger("train")


@dataclass(frozen=True, slots=True)
class Start:
    """What the loop goes on from.

    Attributes:
        step: Optimizer steps that are done.
        data_state: Where the data plan goes on; None for its beginning.
        ledger: Samples that all ranks skipped so far.
        num_tokens: Real tokens that were trained on so far.
        watch: What `SpikeWatch.to_json` gave; None at the beginning.
        ranks: What `RankAllocator.to_json` gave; None at the beginning, and where ranks stay.
    """

    step: int = 0
    data_state: LoaderState | None = None
    ledger: tuple[Skipped, ...] = ()
    num_tokens: int = 0
    watch: dict[str, Any] | None = None
    ranks: dict[str, Any] | None = None

    @classmethod
    def of(cls, loaded: Loaded, data_state: LoaderState) -> Start:
        """After a checkpoint was loaded, with the data going on from `data_state`."""
        ledger = tuple(Skipped.from_json(entry) for entry in loaded.ledger)
        watch, ranks = (loaded.data_state.get(name) for name in (WATCH, RANKS))
        return cls(loaded.manifest.step, data_state, ledger, loaded.manifest.num_tokens, watch, ranks)


def find_start(
    run: RunFolder, engine: Engine, world: World, hold: Hold, *, resume: str, fingerprints: dict[str, str], base: Base | None = None
) -> Start:
    """Choose a checkpoint, the same on all ranks, and fill the engine from it.

    Args:
        run: The run folder.
        engine: Freshly built.
        world: The ranks.
        hold: This job's hold of the run.
        resume: `auto` takes the newest good checkpoint of the run, `never` none; anything else is a checkpoint folder.
        fingerprints: Name -> digest of what must be as it was when the checkpoint was written.
        base: Weights that the engine's frozen parameters are; None where checkpoints hold these as well.

    Raises:
        CheckpointError: The named checkpoint is not good, every checkpoint of the run is damaged, or it is of another model
            or vocabulary, or its adapter is for other weights.
    """
    if resume == "never":
        return Start()
    with fail_together():
        if world.is_main:
            set_aside_abandoned(run.path, hold)
    own = [path.name for _, path in committed(run.checkpoints)]
    asked = Path(resume).resolve()
    if resume != "auto" and asked.parent == run.checkpoints.resolve():
        later = [name for name in own if name > asked.name]
        if later:
            raise _together(
                CheckpointError(
                    f"{run.path} went on after {asked.name} ({', '.join(later)}); resume it in a new run: --run OTHER --resume {resume}"
                )
            )
    # A run that was started from another run's checkpoint and has its own since then goes on from these.
    if resume == "auto" or (own and asked.parent != run.checkpoints.resolve()):
        choice = newest_good(run.checkpoints, world, hold=hold)
        if choice.folder is None and choice.damaged:
            raise _together(
                CheckpointError(
                    f"every checkpoint in {run.checkpoints} is damaged ({', '.join(sorted(choice.damaged))}); "
                    "restore one, or start anew with another --run"
                )
            )
        folder = choice.folder
    else:
        folder = require_good(Path(resume), world)
    if folder is None:
        return Start()
    loaded = load(folder, engine, world)
    for name, expected in fingerprints.items():
        found = loaded.manifest.fingerprints.get(name)
        if found != expected:
            message = f"checkpoint {folder} was written with {name} {found}, this run has {expected}; resume with what it was written with"
            raise _together(CheckpointError(message))
    _check_base(folder, loaded.manifest.base, base)
    _log.info("resumed from %s (written by %d ranks)", folder, loaded.manifest.world_size)
    return Start.of(loaded, with_decisions(LoaderState.from_json(loaded.data_state), run.path))


def _check_base(folder: Path, theirs: Base | None, ours: Base | None) -> None:
    if (theirs and theirs.digest) != (ours and ours.digest):
        stands = f"stands on {theirs.path} ({theirs.digest})" if theirs else "holds all of its weights"
        has = f"is on {ours.path} ({ours.digest})" if ours else "starts from none"
        raise _together(CheckpointError(f"checkpoint {folder} {stands}, this run {has}; an adapter fits its own weights alone"))


def _together(error: CheckpointError) -> CheckpointError:
    """Mark an error that every rank finds by itself."""
    error.on_all_ranks = True
    return error
