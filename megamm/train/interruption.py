"""How a run is asked to stop: a signal, a STOP file, a bound on its time or its steps; every rank then finishes the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

STOP_FILE = "STOP file"
STOP_AFTER = "stop_after"
MAX_SECONDS = "max_seconds"
INTERRUPT = signal.SIGINT.name
_RESTS = (STOP_FILE, STOP_AFTER, MAX_SECONDS, INTERRUPT)

_STDERR = 2
_TOLD = b"\nmegamm: stopping after this step, with a checkpoint; press Ctrl-C again to end at once\n"


def wants_restart(reason: str) -> bool:
    """Whether a scheduler should start the run again: it was the scheduler, not a person, that ended it."""
    return reason not in _RESTS


class StopRequest:
    """Remembers that this rank was asked to stop. The handler only sets a flag, so that further signals change nothing.

    But for SIGINT, which is somebody at a keyboard: the second one is a KeyboardInterrupt. Where it is ignored it stays so: a shell
    does that for what runs in the background, and `launchers/local.sh`, which passes SIGINT on as SIGTERM, starts its ranks there.

    `reason` is local to the rank; the loop adds over ranks whether there is one, in the reduction that every step makes anyway, so
    all ranks leave after the same step.

    Args:
        stop_file: A file whose presence asks for a stop (looked at by the ranks that have it in sight).
        max_seconds: Asks for a stop when so much time has passed from here on; 0 for never.
        stop_after: Asks for a stop once this step is done; 0 for never.
    """

    def __init__(self, stop_file: Path, *, max_seconds: float = 0.0, stop_after: int = 0):
        self._stop_file = stop_file
        self.stop_after = stop_after
        self._end = time.monotonic() + max_seconds if max_seconds else float("inf")
        self._signal: int | None = None
        self._was_interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere (a notebook's worker) the STOP file still works.
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            numbers = [number for number in SIGNALS if number != signal.SIGINT or not ignored]
            self._previous = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._was_interrupted:
                raise KeyboardInterrupt
            self._was_interrupted = True
            # Not `print`: the signal may have come in the middle of one. A terminal that is gone must not end the run.
            with contextlib.suppress(OSError):
                os.write(_STDERR, _TOLD)
        # What came first led to the stop, and says whether the run is to be started again.
        self._signal = self._signal or number

    def is_reached(self, step: int) -> bool:
        """Whether the run is as far as this command lets it come: the same on all ranks, which need not tell each other."""
        return 0 < self.stop_after <= step

    @property
    def reason(self) -> str | None:
        """What asks this rank to stop; None where nothing does. A STOP file comes first: whoever wrote it wants the run to rest."""
        # Storage that fails for a moment is nobody's wish to stop, and no reason to end.
        with contextlib.suppress(OSError):
            if self._stop_file.exists():
                return STOP_FILE
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return MAX_SECONDS if time.monotonic() >= self._end else None
