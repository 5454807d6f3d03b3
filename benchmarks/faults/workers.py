"""Decoder processes that are killed or stopped while they work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import beside, encoded, media_sample, pack, picture

PROCESSES: dict[str, Any] = {"decoders": "processes", "decode_workers": 2, "decode_timeout_seconds": 4.0}


def killed(canary: Path) -> Iterator[Case]:
    """Processes are killed, some time after each of them started."""
    for number, seconds in ((signal.SIGKILL, 1.5), (signal.SIGKILL, 0.0), (signal.SIGSEGV, 1.5), (signal.SIGTERM, 1.5)):
        yield _case(f"{number.name} after {seconds} s", number, seconds=seconds, times=2)


def stopped(canary: Path) -> Iterator[Case]:
    """Processes are stopped and never continued."""
    for seconds in (1.5, 3.0):
        yield _case(f"SIGSTOP after {seconds} s", signal.SIGSTOP, seconds=seconds, times=1)


def _case(name: str, number: signal.Signals, *, seconds: float, times: int) -> Case:
    from PIL import Image

    # Most of a second of decoding, so that there is something to hit.
    large = encoded(Image.new("RGB", (7900, 7900), (9, 90, 200)), "PNG", compress_level=1)
    samples = beside({"p0": media_sample("0.jpg", picture()), "p1": media_sample("0.png", large)})
    return Case(name, pack(samples), samples, settings=PROCESSES, around=lambda: _beset(number, seconds, times), passes=True)


@contextmanager
def _beset(number: signal.Signals, seconds: float, times: int) -> Iterator[None]:
    """Send a signal to that many decoder processes, each once, when it is `seconds` old."""
    over = Event()

    def watch() -> None:
        hit: set[int] = set()
        while len(hit) < times and not over.wait(0.002):
            for child in psutil.Process().children():
                try:
                    is_worker = any("decoder_worker" in part for part in child.cmdline())
                    if is_worker and child.pid not in hit and time.time() - child.create_time() >= seconds:
                        os.kill(child.pid, number)
                        hit.add(child.pid)
                except (psutil.NoSuchProcess, ProcessLookupError):
                    continue

    thread = Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
