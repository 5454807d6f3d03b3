"""How fast nodes add up tensors with each other: each node by itself, in pairs, and all together.

Pairs come in rounds in which every node has one partner, so that a round tells of many links at once, and a slow node is slow with every
partner that it has. Every group is made by itself, with an end to its waiting: a pair that cannot talk costs its round and no more.
"""

from __future__ import annotations

import os
import statistics
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Documented as torch.distributed's, and not re-exported by it.
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from megamm.core.env import RankInfo
from megamm.preflight.meeting import Meeting, within
from megamm.preflight.stopwatch import seconds_of

_NUM_REDUCTIONS = 5
_MAX_ROUNDS = 15


def pair_rounds(num_nodes: int, max_rounds: int = _MAX_ROUNDS) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of nodes, by the circle method: after n - 1 rounds all have met.

    Args:
        num_nodes: n; where it is odd one node rests in each round.
        max_rounds: As many rounds at most, spread over all.
    """
    circle: list[int | None] = [*range(num_nodes), *([None] if num_nodes % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        pairs = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        rounds.append([tuple(sorted((one, other))) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    step = max(1, len(rounds) // max_rounds)
    return rounds[::step][:max_rounds]


def measure_links(meeting: Meeting, ranks_of: dict[str, list[int]], num_bytes: int) -> None:
    """Do this task's part of all rounds, and post under `links` what it saw: a name of the group -> bytes a second, or an error.

    Args:
        meeting: All tasks of `ranks_of` are in it.
        ranks_of: Node -> its ranks.
        num_bytes: What is added up.
    """
    nodes = list(ranks_of)
    whole = [[tuple(range(len(nodes)))]] if len(nodes) > 2 else []
    rounds = [[(number,) for number in range(len(nodes))], *pair_rounds(len(nodes)), *whole]
    seen: dict[str, Any] = {}
    for number, groups in enumerate(rounds):
        if not meeting.is_whole:
            break
        for group in groups:
            ranks = sorted(rank for member in group for rank in ranks_of[nodes[member]])
            if meeting.info.rank in ranks and len(ranks) > 1:
                seen[group_name([nodes[member] for member in group], len(nodes))] = _measure(meeting, f"group/{number}", ranks, num_bytes)
        meeting.end_round()
    meeting.post("links", seen)


def group_name(members: list[str], num_nodes: int) -> str:
    """How a group is called in the report."""
    return "all" if len(members) == num_nodes and num_nodes > 2 else "+".join(members)


def _measure(meeting: Meeting, prefix: str, ranks: list[int], num_bytes: int) -> dict[str, Any]:
    """The bandwidth that this task sees of an all-reduce among some ranks: what each link carries, as nccl-tests count it."""
    try:
        return within(1.5 * meeting.timeout_seconds, _all_reduce, meeting, prefix, ranks, num_bytes)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        return {"error": str(error).strip().partition("\n")[0]}


def _all_reduce(meeting: Meeting, prefix: str, ranks: list[int], num_bytes: int) -> dict[str, Any]:
    limit = timedelta(seconds=meeting.timeout_seconds)
    store = PrefixStore(f"{prefix}/{ranks[0]}", meeting.store)
    tensor = torch.ones(num_bytes // 4, device=_device(meeting.info))
    if tensor.is_cuda:
        # A thread of its own begins on the first GPU.
        torch.cuda.set_device(tensor.device)
    group = _group(store, ranks.index(meeting.info.rank), len(ranks), limit, on_gpu=tensor.is_cuda)
    try:
        seconds = []
        for _ in range(_NUM_REDUCTIONS):
            tensor.fill_(1)
            seconds.append(seconds_of(lambda: group.allreduce([tensor]).wait(limit), tensor.device))
            if not bool((tensor == len(ranks)).all()):
                return {"error": f"{len(ranks)} ones add up to {float(tensor[tensor != len(ranks)][0])}"}
    except (dist.DistError, RuntimeError):
        # Otherwise the next group would wait for what this one has on the GPU.
        group.abort()
        raise
    # NCCL keeps connections and their memory until it is told.
    group.shutdown()
    # The first one opens connections.
    typical = statistics.median(seconds[1:])
    return {"bytes_per_second": 2 * (len(ranks) - 1) / len(ranks) * num_bytes / typical}


def _group(store: Store, rank: int, size: int, limit: timedelta, *, on_gpu: bool) -> Any:
    if not on_gpu:
        return dist.ProcessGroupGloo(store, rank, size, limit)
    # NCCL's watchdog would end the process on a link that does not answer: here that is a result, and `wait` raises it.
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _device(info: RankInfo) -> torch.device:
    return torch.device("cuda", info.local_rank) if torch.cuda.is_available() else torch.device("cpu")
