"""One class in a process of its own: verdicts, code that ran, peak memory."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from benchmarks.faults.case import Case, Tally
from benchmarks.faults.corpus import healthy, pack

PRELOAD = [
    "benchmarks.faults.classes",
    "benchmarks.faults.ours",
    "benchmarks.faults.peer",
    "webdataset",
    "torch",
    "transformers.audio_utils",
]


def new_pool(num_workers: int) -> ProcessPoolExecutor:
    """Processes that live for one class each, forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return ProcessPoolExecutor(num_workers, mp_context=context, max_tasks_per_child=1)


def measure(name: str, side: str, every: int, scratch: Path) -> Tally:
    """Try all cases of a class.

    Args:
        name: Of the class.
        side: `megamm` or `webdataset`.
        every: Only each so-manieth case.
        scratch: Where folders may be made.

    Returns:
        What became of them.
    """
    from benchmarks.faults.classes import FAULTS
    from benchmarks.faults.ours import OurRun
    from benchmarks.faults.peer import PeerRun

    _be_quiet()
    fault = next(fault for fault in FAULTS if fault.name == name)
    tally = Tally()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        canary = Path(folder) / "canary"
        run = (OurRun if side == "megamm" else PeerRun)(Path(folder) / "shards")
        start = time.monotonic()
        # What a healthy run loads once is no cost of the faults.
        run.run(Case("healthy", pack(healthy()), healthy()))
        for case in islice(fault.cases(canary), 0, None, every):
            _reset_peak()
            before = _memory("VmRSS")
            verdict, message = run.run(case)
            tally.add(case.name, verdict, message.replace(folder, "FOLDER"))
            tally.peak_bytes = max(tally.peak_bytes, _memory("VmHWM") - before)
            for trace in (canary, Path(canary.name)):
                if trace.exists():
                    trace.unlink()
                    tally.executed += 1
        tally.seconds = time.monotonic() - start
    return tally


def _be_quiet() -> None:
    """Warnings of damaged media are what is wanted here."""
    warnings.simplefilter("ignore")
    logger = logging.getLogger("megamm")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _reset_peak() -> None:
    """Let the kernel forget the highest memory of this process so far."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the highest since `_reset_peak`) in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10
