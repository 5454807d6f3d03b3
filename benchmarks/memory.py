"""What a piece of work adds to this process's resident memory at its worst moment."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import TracebackType

import psutil

_EVERY_SECONDS = 0.002
_STATM = Path("/proc/self/statm")


class PeakMemory:
    """A context manager that looks every two milliseconds.

    Attributes:
        added_bytes: Peak above what was resident when the block began, after the block.
    """

    def __init__(self) -> None:
        self.added_bytes = 0
        self._ended = threading.Event()

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._baseline = resident_bytes()
        self._peak = self._baseline
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._look()
        self._ended.set()
        self._thread.join()
        self.added_bytes = self._peak - self._baseline

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process, mapped files included."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * 4096
    return psutil.Process().memory_info().rss
