"""How ranks failed: a record a rank and start in the run folder, kept for ever. Whoever reads them needs no torch.

RUN/errors/start_00003.rank_00001.json   the exception that ended rank 1 of the third start, and the samples in flight
RUN/errors/start_00003.stall.json        nothing moved; where every rank was
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamm.core.errors import MegaMMError, may_pass
from megamm.core.files import read_json, write_json
from megamm.telemetry.heartbeat import Beat
from megamm.telemetry.whereabouts import Whereabouts, Who

FOLDER = "errors"
# What gloo, NCCL and torch say where another rank is gone.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
    "Timed out waiting",
    "Socket closed",
)


class FailureLog:
    """Records the first exception of this rank; a context manager, used around all work and again around the loop inside of it.

    The inner one is left before anything is closed, so that what closing raises does not take the cause's place.

    Attributes:
        where: Where this rank is.
        told: The exception that was recorded, its traceback printed unless it is one of ours; its only state.

    Args:
        run: The run folder; nothing is written where no run was started.
        who: This rank.
        where: Where it is.
        ignored: Exceptions that are none of the run's business, such as the run being another job's by now.
    """

    def __init__(self, run: Path, who: Who, where: Whereabouts, *, ignored: tuple[type[Exception], ...] = ()):
        self._run, self._who, self.where, self._ignored = run, who, where, ignored
        self.told: Exception | None = None

    def __enter__(self) -> FailureLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # KeyboardInterrupt is somebody at a keyboard, no failure.
        if isinstance(error, Exception) and not isinstance(error, self._ignored) and self.told is None:
            self.told = error
            is_told_by_another = isinstance(error, MegaMMError) and error.on_all_ranks and self._who.rank != 0
            if not is_told_by_another:
                self._record(error)

    def _record(self, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        is_ours = isinstance(error, MegaMMError)
        lost_peer = not is_ours and any(words in str(error) for words in _LOST_PEER)
        if not is_ours:
            # First of all where somebody sees it: the disk may be what is broken.
            shown = f" lost another rank, whose own record says why: {error}" if lost_peer else f":\n{text}"
            with contextlib.suppress(OSError, ValueError):
                print(f"rank {self._who.rank}{shown}", file=sys.stderr, flush=True)
        if not (self._run / "config.json").is_file():
            return
        place = self.where.place
        facts = {
            **self._who.to_json(),
            "time": time.time(),
            "step": place.step,
            "phase": place.phase,
            "kind": type(error).__name__,
            "message": " ".join(str(error).split()),
            "traceback": text,
            "lost_peer": lost_peer,
            "may_pass": may_pass(error),
            "samples": self._samples(),
        }
        _write(self._run, f"start_{self._who.start:05d}.rank_{self._who.rank:05d}.json", facts)

    def _samples(self) -> list[dict[str, Any]]:
        try:
            return [asdict(sample) for sample in self.where.place.samples()]
        except Exception as problem:
            print(f"rank {self._who.rank}: the samples in flight cannot be named: {problem}", file=sys.stderr, flush=True)
            return []


def record_stall(run: Path, who: Who, place: dict[str, Any], *, message: str, beats: Sequence[Beat], silent: Sequence[int]) -> None:
    """Record that nothing moved.

    Args:
        run: The run folder.
        who: The rank that tells.
        place: `step` and `phase` to file it under.
        message: What was found, in one line.
        beats: What each rank said last.
        silent: Ranks that said nothing more.
    """
    ranks = [{**asdict(one), "is_silent": one.rank in silent} for one in beats]
    facts = {
        **who.to_json(),
        **place,
        "time": time.time(),
        "kind": "Stall",
        "message": message,
        "lost_peer": False,
        "may_pass": True,
        "ranks": ranks,
    }
    _write(run, stall_name(who), facts)


def stall_name(who: Who) -> str:
    """File of a start's stall."""
    return f"start_{who.start:05d}.stall.json"


def is_stall_recorded(run: Path, who: Who) -> bool:
    """Whether some rank of this start has told the stall."""
    return (run / FOLDER / stall_name(who)).is_file()


def read_failures(run: Path) -> list[dict[str, Any]]:
    """All records of a run, by start, then by time; files that cannot be read are left out."""
    found = []
    for path in sorted((run / FOLDER).glob("start_*.json")):
        with contextlib.suppress(OSError, ValueError):
            facts = read_json(path)
            if isinstance(facts, dict) and {"start", "time", "kind", "message", "lost_peer"} <= facts.keys():
                found.append(facts)
    return sorted(found, key=lambda one: (one["start"], one["time"]))


def last_failure(run: Path) -> dict[str, Any] | None:
    """What ended the newest start that failed: its first record that is no consequence of another rank's end."""
    found = read_failures(run)
    last = [one for one in found if one["start"] == found[-1]["start"]]
    return min(last, key=lambda one: one["lost_peer"], default=None)


def _write(run: Path, name: str, facts: dict[str, Any]) -> None:
    try:
        write_json(run / FOLDER / name, facts)
    except (OSError, ValueError) as problem:
        with contextlib.suppress(OSError, ValueError):
            print(f"the record {FOLDER}/{name} was not written: {problem}", file=sys.stderr, flush=True)
