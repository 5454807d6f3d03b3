"""Where tasks meet before anything is known to work: a key-value store on the first node, every wait with an end.

A collective waits for whoever does not come. A store can be asked who has come so far, so a node that hangs or is cut off is named
instead of hanging the others. Who works for long says so after each step (a beat): silence counts, not duration.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# Documented as torch.distributed's, and not re-exported by it.
from torch.distributed import HashStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megamm.core.env import RankInfo
from megamm.core.errors import ConfigError, MegaMMError

_LOOK_SECONDS = 0.05
_BEAT_SECONDS = 5.0


class Unreachable(MegaMMError):
    """The task that keeps the store does not answer."""


@dataclass
class Meeting:
    """This task among its peers.

    Attributes:
        info: Its rank, its rank on the node, the number of tasks.
        store: What they share.
        timeout_seconds: Longest time that one thing may take; work of many steps says after each that it goes on.
        num_rounds: Rounds that are over; every task counts the same ones.
        is_whole: No round has missed a task; every task says the same after the same round.
    """

    info: RankInfo
    store: Store
    timeout_seconds: float
    num_rounds: int = field(default=0, init=False)
    is_whole: bool = field(default=True, init=False)
    _last_beat: float = field(default=-math.inf, init=False, repr=False)

    @classmethod
    def join(cls, info: RankInfo, timeout_seconds: float) -> Meeting:
        """Open the store on rank 0, or reach it.

        Raises:
            ConfigError: MASTER_ADDR or MASTER_PORT is not set, or the port is taken.
            Unreachable: The store does not answer in time.
        """
        if info.world_size == 1:
            return cls(info, HashStore(), timeout_seconds)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"{', '.join(missing)} not set for WORLD_SIZE={info.world_size}; start tasks through launchers/node.sh")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=timeout_seconds)
        try:
            store = TCPStore(host, port, is_master=info.rank == 0, timeout=limit, wait_for_workers=False)
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

    def beat(self) -> None:
        """Say that this task is at work; whoever waits for it goes on waiting. Called as often as something was done.

        Raises:
            Unreachable: The store is gone.
        """
        now = time.monotonic()
        if now - self._last_beat >= min(_BEAT_SECONDS, self.timeout_seconds / 10):
            self._last_beat = now
            self._store("add", f"beat/{self.info.rank}", 1)

    def hear(self, keys: Mapping[int, str]) -> dict[int, Any]:
        """The values of keys, by the rank that sets each. A rank is given up that neither does so nor says in time that it is at work.

        No two tasks may wait for each other: both would be at work for ever.

        Raises:
            Unreachable: The store is gone.
        """
        heard: dict[int, Any] = {}
        # Rank -> how often it said that it is at work, and when that was last seen to grow.
        signs = dict.fromkeys(keys, (0, time.monotonic()))
        while signs:
            self.beat()
            for rank, (num_beats, since) in list(signs.items()):
                # Not `wait`: its time-outs are not told apart from a store that is gone.
                if self._store("check", [keys[rank]]):
                    heard[rank] = json.loads(self._store("get", keys[rank]))
                    del signs[rank]
                elif (num_now := self._store("add", f"beat/{rank}", 0)) != num_beats:
                    signs[rank] = (num_now, time.monotonic())
                elif time.monotonic() - since > self.timeout_seconds:
                    del signs[rank]
            if signs:
                self._pause()
        return heard

    def gather(self, name: str, ranks: Iterable[int]) -> dict[int, Any]:
        """What ranks posted under a name, as `hear` does."""
        return self.hear({rank: f"{name}/{rank}" for rank in ranks})

    def follow(self, key: str) -> Any:
        """The value of a key that rank 0 sets.

        Raises:
            Unreachable: It does not, or the store is gone.
        """
        heard = self.hear({0: key})
        if not heard:
            raise Unreachable(f"the first node shows no work for {self.timeout_seconds:.0f} s")
        return heard[0]

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
            self._pause()
            num_here = self._store("add", key, 0)
        how = "whole" if num_here >= self.info.world_size else "missing"
        self.is_whole = self._store("compare_set", ended, "", how) == b"whole"

    def _pause(self) -> None:
        # Thousands of tasks must not keep the store busy with being asked.
        time.sleep(_LOOK_SECONDS * max(1.0, self.info.world_size / 512))

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
    """Nodes of this job, that of rank 0 first, as `slurm/common.sh` says; empty without a scheduler."""
    return os.environ.get("MEGAMM_NODES", "").split()


def absent_nodes(present: Mapping[int, str], world_size: int, planned: Sequence[str]) -> dict[str, int]:
    """Nodes that tasks are missing from -> how many. Counted, because the order of ranks over nodes is the scheduler's own affair.

    Args:
        present: Rank -> node, of those that came.
        world_size: Tasks of the job, equally many a node.
        planned: Its nodes, where a scheduler knows them.
    """
    each, num_came = world_size // max(1, len(planned)), Counter(present.values())
    absent = {node: each - num_came[node] for node in planned if num_came[node] < each}
    if sum(absent.values()) == world_size - len(present):
        return absent
    return {f"the node of rank {rank}": 1 for rank in range(world_size) if rank not in present}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
