"""Signs of life: a small file a rank, renewed every few seconds, that says where the rank is. Whoever reads them needs no torch.

RUN/heartbeats/start_00003.rank_00001.json   what rank 1 of the third start said last; gone when it left in order
RUN/heartbeats/start_00003.stalled           some rank of that start found that nothing moves: every rank reports itself and ends

Names hold the start, because a rank that lost the run may be cut off for long and then write once more: nothing of a later start's.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType

from megamm.telemetry.whereabouts import Place, Who

FOLDER = "heartbeats"
_MAX_CALLS = 3
# Around every call of a module, and never what one waits for.
_WRAPPERS = ("torch.nn", "deepspeed.utils.nvtx")


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        start: Number of the run's owner that the rank belongs to.
        rank: Global rank.
        host: Name of its machine.
        pid: Its process.
        count: Beats before this one: where it does not grow the rank is silent, whatever clocks say.
        time: By the rank's own clock, in seconds since the epoch.
        step: The step under way, or the one that was done last.
        phase: See `whereabouts.Phase`.
        phase_seconds: How long it has been at that.
        doing: The innermost calls that matter, the innermost first.
        num_collectives: Collectives that it began; a rank that is behind its peers misses one.
        shard: Where its first sample lies; empty where it is at none.
        key: Of that sample.
        is_stalled: It has found, or was told, that nothing moves, and reported itself.
    """

    start: int
    rank: int
    host: str
    pid: int
    count: int
    time: float
    step: int
    phase: str
    phase_seconds: float
    doing: str
    num_collectives: int
    shard: str = ""
    key: str = ""
    is_stalled: bool = False


def beat(who: Who, place: Place, count: int, *, num_collectives: int, is_stalled: bool = False) -> Beat:
    """What to say now. Names the sample only where the rank has been at it for a while: a name costs a look into an index."""
    seconds = time.monotonic() - place.began
    first = next(iter(place.samples()), None) if is_stalled or seconds > 1.0 else None
    return Beat(
        start=who.start,
        rank=who.rank,
        host=who.host,
        pid=who.pid,
        count=count,
        time=time.time(),
        step=place.step,
        phase=place.phase,
        phase_seconds=round(seconds, 1),
        doing=doing(),
        num_collectives=num_collectives,
        shard="" if first is None else first.shard,
        key="" if first is None else f"{first.dataset}/{first.key}",
        is_stalled=is_stalled,
    )


def doing() -> str:
    """What the main thread is in, innermost first: up to three calls of other packages, collectives among them, and three of megamm."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    outer: list[str] = []
    own: list[str] = []
    while frame is not None and len(own) < _MAX_CALLS:
        module = _module(frame)
        call = f"{frame.f_code.co_name} ({module.removeprefix('megamm.')}:{frame.f_lineno})"
        if module.startswith("megamm."):
            own.append(call)
        elif not own and len(outer) < _MAX_CALLS and not module.startswith(_WRAPPERS):
            outer.append(call)
        frame = frame.f_back
    return " < ".join(outer + own)


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


class Heartbeats:
    """The folder of a run's heartbeats. It holds no state: readers see what ranks wrote last.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path):
        self.folder = run / FOLDER

    def write(self, one: Beat) -> None:
        """Replace a rank's file. Not synced: after a power cut nobody is alive."""
        self.folder.mkdir(exist_ok=True)
        path = self._path(one.start, one.rank)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(asdict(one)) + "\n", encoding="utf-8")
        draft.replace(path)

    def read(self, start: int) -> list[Beat]:
        """What each rank of a start said last, in the order of ranks; files that cannot be read are left out."""
        return [one for path in sorted(self.folder.glob(f"{_prefix(start)}rank_*.json")) if (one := _read(path)) is not None]

    def remove(self, start: int, rank: int) -> None:
        """Take a rank's file away, and the folder with the last of them."""
        self._path(start, rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def clear_before(self, start: int) -> None:
        """Remove what earlier starts left behind, whether they died or came back late; one rank does it."""
        for path in self.folder.glob("*"):
            # Zeros in front make the order of names that of numbers.
            if path.name < _prefix(start):
                path.unlink(missing_ok=True)

    def tell(self, start: int) -> None:
        """Let all ranks of a start know that nothing moves; those of a later one, which took the run over, are not concerned."""
        self.folder.mkdir(exist_ok=True)
        self._notice(start).touch()

    def is_told(self, start: int) -> bool:
        """Whether some rank of that start found that nothing moves. Asked after `write`, which makes a network file system look anew."""
        return self._notice(start).exists()

    def _notice(self, start: int) -> Path:
        return self.folder / f"{_prefix(start)}stalled"

    def _path(self, start: int, rank: int) -> Path:
        return self.folder / f"{_prefix(start)}rank_{rank:05d}.json"


def read_beats(run: Path, start: int) -> list[Beat]:
    """What each rank of a run's start said last; none where none of it lives and none died."""
    return Heartbeats(run).read(start)


def _prefix(start: int) -> str:
    return f"start_{start:05d}."


def _read(path: Path) -> Beat | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return Beat(**facts) if facts.keys() == {field.name for field in fields(Beat)} else None
    except (OSError, ValueError, AttributeError):
        return None
