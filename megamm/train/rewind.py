"""Going back from a spike: to the last good checkpoint from before it, and on from there without the data since then.

Everything happens in the process that trains: weights, moments, counters and random states are filled from the checkpoint as on a
resume, which is exact (`checkpoint.load`), and only the loader starts anew.
"""

from __future__ import annotations

from dataclasses import replace

from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.load import load
from megamm.checkpoint.manifest import read_data_state
from megamm.core.errors import MegaMMError
from megamm.core.logging import get_logger
from megamm.data.planning.plan import DataPlan
from megamm.data.planning.state import LoaderState
from megamm.engine.distributed import World, fail_together
from megamm.engine.runtime import Engine
from megamm.train.resume import Start
from megamm.train.rewinds import decide, set_aside_abandoned
from megamm.train.run_folder import RunFolder
from megamm.train.spikes import Trouble

_log = get_logger("train")


def go_back(
    run: RunFolder, state: LoaderState, trouble: Trouble, *, plan: DataPlan, engine: Engine, world: World, hold: Hold, max_rewinds: int
) -> Start:
    """Fill the engine from before the trouble and say where to go on; every rank calls it, while no save is under way.

    Args:
        run: The run folder.
        state: After the last step.
        trouble: What happened, and since when.
        plan: Of the data.
        engine: As the last step left it.
        world: The ranks.
        hold: This job's hold of the run.
        max_rewinds: How often the run may go back.

    Returns:
        What the loop goes on from; its state leaves out all data that was delivered since the checkpoint.

    Raises:
        MegaMMError: The run went back often enough, or has no good checkpoint from before the trouble (on every rank).
    """
    if sum(stretch.is_rewind for stretch in state.stretches) >= max_rewinds:
        raise _together(f"{trouble.reason}; spike.max_rewinds={max_rewinds} is used up: {_ADVICE}")
    folder = newest_good(run.checkpoints, world, hold=hold, before=trouble.first_step).folder
    if folder is None:
        raise _together(
            f"{trouble.reason}; no good checkpoint is from before step {trouble.first_step}: lower checkpoint.every, or {_ADVICE}"
        )
    with fail_together():
        saved = LoaderState.from_json(read_data_state(folder))
        # What was kept out or accepted since that checkpoint stays so.
        known = {"exclusions": state.exclusions, "changes": state.changes, "stretches": state.stretches}
        there = replace(plan.resume(saved), **known)
        first, last = plan.next_step(there).state.plan.num_steps, state.plan.num_steps
        onward = plan.leave_out(there, first, last, reason=trouble.reason, from_step=state.step, to_step=saved.step)
        if world.is_main:
            hold.check()
            decide(run.path, onward.stretches[-1])
            set_aside_abandoned(run.path, hold)
    if world.is_main:
        _log.warning("%s; %s", trouble.reason, _told(onward))
    return Start.of(load(folder, engine, world), onward)


_ADVICE = (
    "`megamm data report` says which data were left out; resume with a lower optim.lr in a new --run, or without those samples (--exclude)"
)


def _told(onward: LoaderState) -> str:
    stretch = onward.stretches[-1]
    return f"going back from step {stretch.from_step} to {stretch.to_step}, without the data of steps {stretch.first} to {stretch.last}"


def _together(message: str) -> MegaMMError:
    error = MegaMMError(message)
    error.on_all_ranks = True
    return error
