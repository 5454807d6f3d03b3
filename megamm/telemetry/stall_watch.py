"""Ends a run in which nothing moves, with the stacks of all ranks and a table of where they are, so that no hours burn in silence.

Two threads watch a rank. The one keeps the clock and ends the process; it touches no file, because storage that stands still is
what stalls most runs. The other one does the file work: heartbeats while all is well, reports at the end, for which the first waits
only so long. Nothing here is a collective: ranks that hang in one could not answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megamm.core.logging import get_logger
from megamm.core.tables import aligned
from megamm.telemetry.failures import is_stall_recorded, record_stall
from megamm.telemetry.heartbeat import Beat, Heartbeats, beat, doing
from megamm.telemetry.whereabouts import Place, Whereabouts, Who

_log = get_logger("telemetry")

_LEAST_STEP_SECONDS = 600.0
_LONGEST_STEPS = 10.0
# How many times as long as a step these may take.
_FACTORS = {"start": 6.0, "save": 6.0, "rewind": 6.0, "leave": 6.0, "evaluate": 3.0}
_FIRST_STEP_FACTOR = 3.0

_MAX_LOOK_SECONDS = 1.0
_LOOKS = 20
_MAX_BEAT_SECONDS = 10.0
_BEATS = 12
# A server of files answers some hundred requests a second beside all else, however many ranks there are.
_RANKS_A_SECOND = 100
_MIN_GATHER_SECONDS = 3.0
# Gathering, waiting for the rank that tells, and as long again for the files of both.
_REPORTS = 3
_NAMED_RANKS = 8


def allowance(stall_seconds: float, place: Place, longest_step_seconds: float) -> float:
    """How long a rank may be at the same place.

    Args:
        stall_seconds: The recipe's; 0 derives it from the steps so far.
        place: Where it is.
        longest_step_seconds: Of the last steps.
    """
    step = stall_seconds or max(_LEAST_STEP_SECONDS, _LONGEST_STEPS * longest_step_seconds)
    is_first = place.is_first_step and place.phase in ("data", "train")
    return step * (_FIRST_STEP_FACTOR if is_first else _FACTORS.get(place.phase, 1.0))


class Stillness:
    """How long a place has not changed. State: the place, and when it was looked at last.

    Time in which nobody looked does not count: a job that is suspended as a whole has not stalled when it goes on.

    Args:
        max_gap_seconds: Longest time between two looks that counts.
    """

    def __init__(self, max_gap_seconds: float):
        self._max_gap_seconds = max_gap_seconds
        self._place: Place | None = None
        self._looked = self._seconds = 0.0

    def look(self, place: Place, now: float) -> float:
        """Note where the rank is now; returns for how long."""
        if place is self._place:
            self._seconds += min(now - self._looked, self._max_gap_seconds)
        else:
            self._place, self._seconds = place, 0.0
        self._looked = now
        return self._seconds


class StallWatch:
    """Watches this rank while the section lasts; a context manager. State: two threads and the number of beats.

    Args:
        run: The run folder; heartbeats and reports go there.
        who: This rank.
        where: Where it is.
        stall_seconds: The recipe's allowance for a step; 0 derives it.
        num_collectives: Counts the collectives that this rank began.
    """

    def __init__(self, run: Path, who: Who, where: Whereabouts, *, stall_seconds: float, num_collectives: Callable[[], int]):
        self._run, self._who, self._where = run, who, where
        self._stall_seconds = stall_seconds
        self._num_collectives = num_collectives
        self._heartbeats = Heartbeats(run)
        least = stall_seconds or _LEAST_STEP_SECONDS
        self._look_seconds = min(_MAX_LOOK_SECONDS, least / _LOOKS)
        self._beat_seconds = max(min(_MAX_BEAT_SECONDS, least / _BEATS), who.world_size / _RANKS_A_SECOND)
        self._gather_seconds = _MIN_GATHER_SECONDS + 2 * self._beat_seconds
        self._num_beats = 0
        self._message = ""
        self._left = threading.Event()
        self._stalled = threading.Event()
        self._reported = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_clock, name="stall-watch", daemon=True),
            threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True),
        ]

    def __enter__(self) -> StallWatch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._left.set()
        self._stalled.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            # A heartbeat may be stuck in storage that stands still; it is a daemon.
            thread.join(self._beat_seconds)
        if error is None:
            with contextlib.suppress(OSError):
                if self._who.rank == 0:
                    self._heartbeats.clear_before(self._who.start)
                self._heartbeats.remove(self._who.start, self._who.rank)

    # --- the clock: no files ---

    def _keep_clock(self) -> None:
        stillness = Stillness(2 * self._look_seconds)
        armed, shown = -self._beat_seconds, float("inf")
        while not self._stalled.is_set():
            now, place = time.monotonic(), self._where.place
            if now > shown:
                self._explain_stacks(now - armed)
            seconds = stillness.look(place, now)
            limit = allowance(self._stall_seconds, place, self._where.longest_step_seconds)
            if now - armed > self._beat_seconds:
                # Python threads stand still where native code keeps the interpreter's lock; this one's stacks come without it.
                faulthandler.dump_traceback_later(limit + self._gather_seconds, exit=False, file=sys.__stderr__ or sys.stderr)
                armed, shown = now, now + limit + self._gather_seconds
            if seconds > limit:
                self._message = f"no progress for {seconds:.0f} s in {place.phase} of step {place.step}, {limit:.0f} s are allowed"
                self._stalled.set()
            self._stalled.wait(self._look_seconds)
        if not self._left.is_set():
            self._end()

    def _explain_stacks(self, seconds: float) -> None:
        """The timer without the interpreter cannot tell a job that is suspended and woken from one that hangs, and has shown stacks."""
        why = "suspended, or in native code that kept the interpreter's lock"
        _say(f"rank {self._who.rank} did nothing at all for {seconds:.0f} s: {why}; stacks under `Timeout` are of then, and it goes on")

    def _end(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        _say(f"rank {self._who.rank} has stalled: {self._message}; it is in {doing()}")
        if not self._reported.wait(_REPORTS * self._gather_seconds):
            self._say_stacks(f"{self._run} does not take the report")
        os._exit(1)

    # --- the heartbeat: files alone ---

    def _keep_beating(self) -> None:
        was_written = True
        while not self._stalled.is_set():
            try:
                if self._may_write():
                    self._beat()
                    was_written = True
                if self._heartbeats.is_told(self._who.start):
                    self._message = "another rank has found that nothing moves"
                    self._stalled.set()
            except OSError as error:
                if was_written:
                    _log.warning("the heartbeat of this rank was not written: %s", error)
                was_written = False
            # A new run's folder comes to be a moment after its ranks.
            self._stalled.wait(self._beat_seconds if self._num_beats else self._look_seconds)
        if not self._left.is_set():
            self._report()
            self._reported.set()

    def _may_write(self) -> bool:
        """A folder that turns out to be refused must stay as it is: a new run's files come with its recipe."""
        return (self._run / "config.json").is_file()

    def _beat(self, *, is_stalled: bool = False) -> None:
        num_collectives = self._num_collectives()
        self._heartbeats.write(beat(self._who, self._where.place, self._num_beats, num_collectives=num_collectives, is_stalled=is_stalled))
        self._num_beats += 1

    def _report(self) -> None:
        """Report this rank, wait for the others to do so, and let the first of those that did tell what all of them said."""
        if not self._may_write():
            self._say_stacks("the run has not begun")
            return
        try:
            with (self._run / "logs" / f"stall.rank_{self._who.rank:05d}.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- start {self._who.start}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {self._message} ---\n")
                file.flush()
                _dump_stacks(file)
            self._beat(is_stalled=True)
            self._heartbeats.tell(self._who.start)
            beats = self._gather()
            silent = [one.rank for one in beats if not one.is_stalled]
            teller = next((one.rank for one in beats if one.is_stalled), self._who.rank)
            if teller == self._who.rank:
                self._tell(beats, silent)
            else:
                self._wait_for_teller()
        except OSError as error:
            self._say_stacks(f"the stall cannot be reported in {self._run}: {error}")

    def _gather(self) -> list[Beat]:
        """What all ranks said last, once each has reported itself or the time for it is over."""
        end = time.monotonic() + self._gather_seconds
        while True:
            beats = self._heartbeats.read(self._who.start)
            if sum(one.is_stalled for one in beats) == self._who.world_size or time.monotonic() > end:
                return beats
            time.sleep(self._look_seconds)

    def _tell(self, beats: list[Beat], silent: list[int]) -> None:
        found = findings(beats, silent, self._who.world_size)
        message = f"rank {self._who.rank}: {self._message}" + (f"; {found}" if found else "")
        _say("\n".join([f"the run has stalled: {message}", *table(beats, silent), f"stacks: {self._run / 'logs'}/stall.rank_*.txt"]))
        place = {"step": self._where.place.step, "phase": self._where.place.phase}
        record_stall(self._run, self._who, place, message=message, beats=beats, silent=silent)

    def _say_stacks(self, why: str) -> None:
        _say(f"rank {self._who.rank}: {why}; the stacks of this rank:")
        _dump_stacks(sys.__stderr__ or sys.stderr)

    def _wait_for_teller(self) -> None:
        """Leave after the one that tells: a launcher ends all ranks with the first that leaves."""
        end = time.monotonic() + self._gather_seconds
        while not is_stall_recorded(self._run, self._who) and time.monotonic() < end:
            time.sleep(self._look_seconds)


def table(beats: list[Beat], silent: list[int]) -> list[str]:
    """Where every rank is, a line each; what is said of silent ranks is as old as their last beat."""
    rows = [
        [
            str(one.rank),
            one.host,
            f"silent for {time.time() - one.time:.0f} s" if one.rank in silent else "reports",
            str(one.step),
            f"{one.phase} {one.phase_seconds:.0f} s",
            str(one.num_collectives),
            f"{one.shard}: {one.key}" if one.shard else "-",
            one.doing,
        ]
        for one in beats
    ]
    return aligned(("rank", "host", "state", "step", "phase", "collectives", "sample", "in"), rows)


def findings(beats: list[Beat], silent: list[int], world_size: int) -> str:
    """Which ranks are silent, and which are where, for the one line that is read first."""
    parts = []
    if silent:
        parts.append(f"rank {_numbers(silent)} is silent: stopped, or gone")
    if missing := sorted(set(range(world_size)) - {one.rank for one in beats}):
        parts.append(f"rank {_numbers(missing)} was never heard")
    places: dict[str, list[int]] = {}
    for one in beats:
        places.setdefault(f"{one.phase} of step {one.step}", []).append(one.rank)
    if len(places) > 1:
        parts += [f"rank {_numbers(ranks)} in {place}" for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))]
    return "; ".join(parts)


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:_NAMED_RANKS])) + (f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else "")


def _dump_stacks(file: IO[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        faulthandler.dump_traceback(file, all_threads=True)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"megamm: {text}", file=sys.stderr, flush=True)
