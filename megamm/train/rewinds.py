"""What a run decided when it went back: which data it leaves out, on the disk before anything of it is done.

`RUN/rewinds.json` lists the stretches, the oldest first. A checkpoint's own state knows those that were decided before it; the file
adds what came after, so a run that is killed between a decision and its next checkpoint does not decide again, on any number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megamm.checkpoint.io import LOCAL, Io
from megamm.checkpoint.manifest import aside, committed, read_data_state
from megamm.core.errors import CheckpointError, DataError
from megamm.core.files import read_json, write_json
from megamm.core.logging import get_logger
from megamm.data.planning.state import LoaderState
from megamm.data.planning.stretch import Stretch

if TYPE_CHECKING:
    from megamm.checkpoint.hold import Hold

FILE = "rewinds.json"
_log = get_logger("train")


def decisions(run: Path) -> tuple[Stretch, ...]:
    """The stretches that a run decided to leave out, in order; none where it never went back.

    Raises:
        CheckpointError: The file is something else.
    """
    path = run / FILE
    if not path.is_file():
        return ()
    try:
        return tuple(Stretch.from_json(one) for one in read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it, or remove it to decide anew") from None


def decide(run: Path, stretch: Stretch) -> None:
    """Write a decision down; one process calls it, before anything follows from it."""
    write_json(run / FILE, [one.to_json() for one in (*decisions(run), stretch)])


def with_decisions(state: LoaderState, run: Path) -> LoaderState:
    """A checkpoint's state with what the run decided after it."""
    later = [one for one in decisions(run) if one.plan == state.fingerprint and one.first > state.plan.num_steps]
    return state.leaving_out(one for one in later if one not in state.stretches)


def set_aside_abandoned(run: Path, hold: Hold, io: Io = LOCAL) -> None:
    """Rename the checkpoints that the run went back from; one process calls it.

    They are kept for whoever wants to look at a spike (`step_00000100.abandoned-1`), and are in nobody's way.

    Args:
        run: The run folder.
        hold: This job's hold of the run.
        io: The file system.
    """
    left_out = decisions(run)
    for _, folder in committed(run / "checkpoints") if left_out else ():
        if _is_abandoned(folder, left_out):
            hold.check()
            io.rename(folder, aside(folder, "abandoned"))
            _log.warning("the run went back from before %s: it is set aside", folder.name)


def _is_abandoned(folder: Path, left_out: tuple[Stretch, ...]) -> bool:
    """Whether a checkpoint was trained on data that the run later decided to leave out."""
    try:
        state = LoaderState.from_json(read_data_state(folder))
    except (CheckpointError, DataError):
        # Damaged: whoever chooses a checkpoint finds out and says so.
        return False
    unknown = [one for one in left_out if one.plan == state.fingerprint and one not in state.stretches]
    return any(one.first <= state.plan.num_steps for one in unknown)
