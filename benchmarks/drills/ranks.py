"""Rank processes without an engine: forked, joined by gloo, and given up as a launcher gives them up.

Forking costs milliseconds where starting costs seconds, so that a fault can be put thousands of times. The processes are real:
they die alone, hold locks and file descriptors of their own, and agree through the collectives of `megamm.engine.distributed`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.engine.distributed import World

_GRACE_SECONDS = 5.0
_WAIT_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank ended.

    Attributes:
        result: What its work returned, as JSON.
        error: Type and message of what it raised; empty without.
        status: Exit status, the negative signal where one killed it.
    """

    result: Any = None
    error: str = ""
    status: int = 0


class Stuck(RuntimeError):
    """Ranks still ran at the end of their time."""


def run_ranks(work: Callable[[World], Any], num_ranks: int, *, timeout_seconds: float = 120.0) -> list[Ended]:
    """Call `work` on every rank and wait for all; once one has died the others are ended a moment later.

    Args:
        work: Returns a JSON value.
        num_ranks: Processes that are forked from this one, which must have no group of ranks itself.
        timeout_seconds: Ranks that run longer are killed.

    Raises:
        Stuck: They ran longer.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        children = [fork(lambda rank=rank: _be_rank(work, rank, num_ranks, folder)) for rank in range(num_ranks)]
        statuses = wait_for(children, timeout_seconds)
        return [_ended(folder / f"{rank}.json", statuses[child]) for rank, child in enumerate(children)]


def judged(judge: Callable[[World], list[str]], num_ranks: int = 1) -> list[str]:
    """What judges found, each a rank with its share of the tries: a problem a try, empty for none; one where a judge itself failed."""
    found = run_ranks(judge, num_ranks, timeout_seconds=7200.0)
    return [
        problem
        for ended in found
        for problem in (ended.result if ended.result is not None else [ended.error or f"a judge ended with {ended.status}"])
    ]


def fork(body: Callable[[], None]) -> int:
    """Start a process that runs `body` and nothing else; returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        logging.getLogger("megamm").setLevel(logging.CRITICAL)
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Nothing of the parent's is flushed, joined or deleted a second time.
        os._exit(status)


def wait_for(children: list[int], timeout_seconds: float) -> dict[int, int]:
    """Exit statuses of processes, the negative signal for a killed one; all have ended afterwards.

    Raises:
        Stuck: Some ran longer and were killed.
    """
    statuses: dict[int, int] = {}
    end = time.monotonic() + timeout_seconds
    is_stuck = False
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (answer := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(answer[1])
                if statuses[child]:
                    end = min(end, time.monotonic() + _GRACE_SECONDS)
        if len(statuses) < len(children) and time.monotonic() > end:
            is_stuck |= not any(statuses.values())
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(_WAIT_SECONDS)
    if is_stuck:
        raise Stuck(f"{len(children)} processes still ran after {timeout_seconds} seconds")
    return statuses


def _be_rank(work: Callable[[World], Any], rank: int, num_ranks: int, folder: Path) -> None:
    # A file instead of a port: thousands of groups follow each other, and ports run out.
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    world = World(rank=rank, local_rank=rank, size=num_ranks, device=torch.device("cpu"), backend="gloo")
    try:
        answer = {"result": work(world)}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        answer = {"error": f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"}
    (folder / f"{rank}.json").write_text(json.dumps(answer))


def _ended(path: Path, status: int) -> Ended:
    return Ended(status=status, **json.loads(path.read_text())) if path.is_file() else Ended(status=status)
