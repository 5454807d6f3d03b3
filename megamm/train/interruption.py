"""How a run is asked to stop: a signal or a STOP file; every rank then finishes the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_STDERR = 2
_TOLD = b"\nmegamm: stopping after this step, with a checkpoint; press Ctrl-C again to end at once\n"


class StopRequest:
    """Remembers that this rank was asked to stop. The handler only sets a flag, so that further signals change nothing.

    But for SIGINT, which is somebody at a keyboard: the second one is a KeyboardInterrupt. Where it is ignored it stays so: a shell
    does that for what runs in the background, and `launchers/local.sh`, which passes SIGINT on as SIGTERM, starts its ranks there.

    `requested` is local to the rank; the loop adds it over ranks in the reduction that every step makes anyway, so all
    ranks leave after the same step.

    Args:
        stop_file: A file whose presence asks for a stop (looked at by the ranks that have it in sight).
    """

    def __init__(self, stop_file: Path):
        self._stop_file = stop_file
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
        self._signal = number

    @property
    def requested(self) -> bool:
        """Whether this rank saw a signal or the STOP file."""
        return self._signal is not None or self._stop_file.exists()

    @property
    def reason(self) -> str:
        """What asked, where something did, for the INTERRUPTED marker."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return "STOP file"
