"""Where tasks meet before anything is known to work: a key-value store on the first node, every wait with an end.

A collective waits for whoever does not come. A store can be asked who has come so far, so a node that hangs or is cut off is named
instead of hanging the others.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megamm.core.env import RankInfo
from megamm.core.errors import ConfigError, MegaMMError

_LOOK_SECONDS = 0.05


class Unreachable(MegaMMError):
    """The task that keeps the store does not answer."""


@dataclass
class Meeting:
    """This task among its peers.

    Attributes:
        info: Its rank, its rank on the node, the number of tasks.
        store: What they share.
        timeout_seconds: Longest time that anything may take.
        num_rounds: Rounds that are over; every task counts the same ones.
        is_whole: No round has missed a task; every task says the same after the same round.
    """

    info: RankInfo
    store: dist.Store
    timeout_seconds: float
    num_rounds: int = field(default=0, init=False)
    is_whole: bool = field(default=True, init=False)

    @classmethod
    def join(cls, info: RankInfo, timeout_seconds: float) -> Meeting:
        """Open the store on rank 0, or reach it.

        Raises:
            ConfigError: MASTER_ADDR or MASTER_PORT is not set, or the port is taken.
            Unreachable: The store does not answer in time.
        """
        if info.world_size == 1:
            return cls(info, dist.HashStore(), timeout_seconds)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"{', '.join(missing)} not set for WORLD_SIZE={info.world_size}; start tasks through launchers/node.sh")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=timeout_seconds)
        try:
            store = dist.TCPStore(host, port, is_master=info.rank == 0, timeout=limit, wait_for_workers=False)
        except (dist.DistError, RuntimeError) as error:
            if info.rank == 0:
                raise ConfigError(f"MASTER_PORT={port} cannot be opened on this node: {_first_line(error)}") from None
            raise Unreachable(f"{host}:{port} does not answer within {timeout_seconds:.0f} s: {_first_line(error)}") from None
        return cls(info, store, timeout_seconds)

    def post(self, name: str, value: Any) -> None:
        """Say something under this rank's name.

        Raises:
            Unreachable: The store is gone.
        """
        self.put(f"{name}/{self.info.rank}", value)

    def put(self, key: str, value: Any) -> None:
        """Set a key for all.

        Raises:
            Unreachable: The store is gone.
        """
        self._store("set", key, json.dumps(value))

    def ask(self, key: str, seconds: float) -> Any:
        """A key's value; None where nobody set it in time.

        Raises:
            Unreachable: The store is gone.
        """
        end = time.monotonic() + seconds
        # Not `wait`: its time-outs are not told apart from a store that is gone.
        while not self._store("check", [key]):
            if time.monotonic() > end:
                return None
            time.sleep(_LOOK_SECONDS)
        return json.loads(self._store("get", key))

    def gather(self, name: str, ranks: Sequence[int], seconds: float) -> dict[int, Any]:
        """What ranks posted under a name, by rank; without those that did not in time, all together."""
        end = time.monotonic() + seconds
        found = {}
        for rank in ranks:
            value = self.ask(f"{name}/{rank}", max(0.0, end - time.monotonic()))
            if value is not None:
                found[rank] = value
        return found

    def end_round(self) -> None:
        """Wait until every task is here, or for twice as long as each may take.

        Tasks that went away would cost every further round as much: the first who has waited for too long says so to all.

        Raises:
            Unreachable: The store is gone.
        """
        self.num_rounds += 1
        key, ended = f"round/{self.num_rounds}", f"round/{self.num_rounds}/ended"
        end = time.monotonic() + 2 * self.timeout_seconds
        num_here = self._store("add", key, 1)
        while num_here < self.info.world_size and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            num_here = self._store("add", key, 0)
        how = "whole" if num_here >= self.info.world_size else "missing"
        self.is_whole = self._store("compare_set", ended, "", how) == b"whole"

    def _store(self, name: str, *arguments: Any) -> Any:
        try:
            return within(self.timeout_seconds, getattr(self.store, name), *arguments)
        except TimeoutError:
            raise Unreachable(f"the first node does not answer within {self.timeout_seconds:.0f} s") from None
        except (dist.DistError, RuntimeError) as error:
            raise Unreachable(f"the first node went away: {_first_line(error)}") from None


def within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives, as long as it gives something in time: the store waits for ever for a machine that hangs, and so does NCCL.

    Raises:
        TimeoutError: It does not; its thread is left behind.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((function(*arguments), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return value


def node_name() -> str:
    """Name of this node as the scheduler knows it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def planned_nodes() -> list[str]:
    """Nodes of this job in the order of ranks, as `slurm/common.sh` says; empty without a scheduler."""
    return os.environ.get("MEGAMM_NODES", "").split()


def node_of(rank: int, world_size: int, nodes: Sequence[str]) -> str:
    """Node that a rank belongs to: Slurm fills one after the other with equal numbers of tasks."""
    if not nodes or world_size % len(nodes):
        return f"the node of rank {rank}"
    return nodes[rank // (world_size // len(nodes))]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
