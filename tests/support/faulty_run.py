"""`megamm` with one thing about a rank gone wrong: python faulty_run.py FAULT pretrain RECIPE ...; the rest is the real program.

Each fault is what a rank meets in the wild, put where it would come from.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SICK_RANK = "1"
SICK_STEP = 3


def skip_collective() -> None:
    """One rank leaves out a reduction that its peers wait in: it goes on to what comes after it."""
    from megamm.train import loop

    real, counted = loop.count, []

    def skipping(*arguments: Any, **facts: Any) -> Any:
        counted.append(counted[-1] if len(counted) == SICK_STEP - 1 else real(*arguments, **facts))
        return counted[-1]

    loop.count = skipping


def hang_reading() -> None:
    """Storage does not answer any more."""
    from megamm.data.loading.source import SampleSource

    real = SampleSource.read

    def hanging(self: SampleSource, planned: Any, progress: Any) -> Any:
        if planned.position >= 40:
            threading.Event().wait()
        return real(self, planned, progress)

    SampleSource.read = hanging


def run_out_of_memory() -> None:
    """The device's memory ends in the middle of a step."""
    import torch

    from megamm.train import loop

    real, steps = loop.train_step, []

    def failing(*arguments: Any, **facts: Any) -> Any:
        steps.append(len(steps) + 1)
        if steps[-1] == SICK_STEP:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments, **facts)

    loop.train_step = failing


def write_slowly() -> None:
    """A file system on which every write of a checkpoint takes long."""
    from megamm.train import pretrain
    from tests.support.faults import slow

    pretrain.Saver = partial(pretrain.Saver, io=slow(2.0))


def none() -> None:
    """A rank that is well."""


FAULTS = {one.__name__: one for one in (none, skip_collective, hang_reading, run_out_of_memory)}
FAULTS_OF_ALL = {one.__name__: one for one in (write_slowly,)}


def main(fault: str, words: list[str]) -> NoReturn:
    """Run a command with a fault."""
    from megamm.cli import run

    if fault in FAULTS_OF_ALL:
        FAULTS_OF_ALL[fault]()
    elif os.environ["RANK"] == SICK_RANK:
        FAULTS[fault]()
    sys.argv = ["megamm", *words]
    run()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1], sys.argv[2:])
