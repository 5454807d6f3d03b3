"""How far the nodes' clocks are apart: each asks the first node for the time, and halves the way there and back (Cristian 1989)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch.distributed as dist

from megamm.preflight.meeting import Meeting, within


def measure_clocks(meeting: Meeting, askers: Sequence[int]) -> None:
    """Do this task's part: ranks of `askers` post under `clock` by how many seconds the first node's clock is ahead of theirs.

    One that could not ask posts None: who posts nothing and is at work would be waited for.

    Args:
        meeting: All `askers` are in it.
        askers: One rank a node, in order.
    """
    ahead = None
    # A task that went away meanwhile is named in the end.
    with contextlib.suppress(dist.DistError, RuntimeError, TimeoutError):
        ahead = within(meeting.timeout_seconds, _ask_or_tell, meeting, askers)
    if meeting.info.rank in askers:
        meeting.post("clock", ahead)
    meeting.end_round()


def _ask_or_tell(meeting: Meeting, askers: Sequence[int]) -> float | None:
    rank = meeting.info.rank
    # Blocking reads instead of looking now and then: what is measured is how long an answer takes.
    if rank == 0:
        for asker in askers:
            meeting.store.set(f"clock-go/{asker}", "1")
            if asker != 0:
                meeting.store.get(f"clock-ask/{asker}")
                meeting.store.set(f"clock-told/{asker}", repr(time.time()))
        return 0.0
    if rank not in askers:
        return None
    meeting.store.get(f"clock-go/{rank}")
    asked = time.time()
    meeting.store.set(f"clock-ask/{rank}", "1")
    told = float(meeting.store.get(f"clock-told/{rank}"))
    return told - (asked + time.time()) / 2
