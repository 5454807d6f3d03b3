"""What a forked rank does: it lets one thing go wrong as asked, and is the ordinary command in everything else."""

from __future__ import annotations

import errno
import functools
import os
import random
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megamm import cli
from megamm.checkpoint.commit import Progress
from megamm.checkpoint.io import Io
from megamm.checkpoint.manifest import step_folder
from megamm.checkpoint.saver import Saver
from megamm.checkpoint.snapshot import Snapshot
from megamm.config.schema import Checkpointing
from megamm.core.json_lines import JsonLines
from megamm.train import pretrain
from tests.support.faults import KilledIo, WatchedIo

_ERRORS = (errno.EIO, errno.ENOSPC)
_NOT_COUNTED = -2


def run(words: Sequence[str], fault: Mapping[str, Any] | None) -> int:
    """Run `megamm WORDS` with a fault of `FAULTS` in it: its `name`, and what that function takes besides the rank."""
    try:
        if fault is not None:
            options = dict(fault)
            FAULTS[options.pop("name")](int(os.environ["RANK"]), **options)
        return cli.main(words)
    except BaseException:
        traceback.print_exc()
        return 1


def killed(rank: int, *, victim: int, step: int, at: int, moment: str) -> None:
    """The victim dies at operation `at` of the save of a step: `before`, in the `middle` of, or `after` it."""
    if rank == victim:
        _save_through(_KilledInSave(step, at, moment))


class _KilledInSave(KilledIo):
    """Counts from the first operation on a step: how many there are before it need not be the same each time."""

    def __init__(self, step: int, at: int, moment: str):
        super().__init__(at, moment)
        self._step = step_folder(step)
        self._is_there = False

    @contextmanager
    def _around(self, name: str, path: Path) -> Iterator[int]:
        self._is_there = self._is_there or self._step in str(path)
        if not self._is_there:
            yield _NOT_COUNTED
            return
        with super()._around(name, path) as number:
            yield number


def noted(rank: int, *, folder: str) -> None:
    """Every operation of every save is written down, a file a rank, so that kills can be put to each."""
    lines = JsonLines(Path(folder) / f"rank_{rank:05d}.jsonl")
    _save_through(WatchedIo(lambda number, name, path: lines.write({"number": number, "name": name, "path": str(path)})))


def slow(rank: int, *, seconds: float) -> None:
    """Every write of a save takes up to that long, another time on every rank, and so does all copying of its snapshot."""
    draw = random.Random(rank)
    _save_through(WatchedIo(lambda number, name, path: time.sleep(draw.uniform(0, seconds)) if name == "write" else None))
    take = Snapshot.take

    def take_slowly(self: Snapshot, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        everything = list(tensors)
        take(self, (_after(seconds / len(everything), one) for one in everything))

    Snapshot.take = take_slowly


def _after(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


def flaky(rank: int, *, share: float, stall_seconds: float, seed: int) -> None:
    """That share of all operations fails (I/O error, full disk), and as many stall."""
    draw = random.Random(f"{seed}/{rank}")

    def before(number: int, name: str, path: Path) -> None:
        chance = draw.random()
        if chance < share:
            error_number = draw.choice(_ERRORS)
            raise OSError(error_number, os.strerror(error_number), str(path))
        if chance < 2 * share:
            time.sleep(draw.uniform(0, stall_seconds))

    _save_through(WatchedIo(before))


def proven(rank: int, *, folder: str) -> None:
    """What the ranks hold right after they have loaded a checkpoint is saved as they hold it, to be compared with what was loaded."""
    del rank
    find_start = pretrain.find_start

    def find_and_save(run: Any, engine: Any, world: Any, *arguments: Any, **options: Any) -> Any:
        start = find_start(run, engine, world, *arguments, **options)
        if start.step:
            settings = Checkpointing(asynchronous=False, keep_last=1000, max_failures=1)
            with Saver(Path(folder), engine, world, settings) as saver:
                saver.save(Progress(start.step))
                saver.finish()
        return start

    pretrain.find_start = find_and_save


def _save_through(io: Io) -> None:
    pretrain.Saver = functools.partial(Saver, io=io)


FAULTS: dict[str, Callable[..., None]] = {"killed": killed, "noted": noted, "slow": slow, "flaky": flaky, "proven": proven}
"""What can go wrong inside a rank; each is called with the rank and the rest of the fault."""
