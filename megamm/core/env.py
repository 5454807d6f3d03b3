"""What the launcher says through the environment: ranks, and settings that must be in place before torch is imported."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

from megamm.core.errors import ConfigError

_DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    # Training reads local folders only; without this transformers asks the hub about them.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class RankInfo:
    """This process among its peers: global rank, rank on its node, number of ranks."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def rank_info() -> RankInfo:
    """Read RANK, LOCAL_RANK and WORLD_SIZE; without them this is the only process.

    Raises:
        ConfigError: Only some of them are set, or they contradict each other.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present = [name for name in names if name in os.environ]
    if not present:
        return RankInfo()
    if len(present) < len(names):
        missing = sorted(set(names) - set(present))
        raise ConfigError(f"{', '.join(missing)} not set beside {', '.join(present)}; start ranks through launchers/node.sh")
    info = RankInfo(*(_integer(name) for name in names))
    if not 0 <= info.rank < info.world_size:
        raise ConfigError(f"RANK={info.rank} is not below WORLD_SIZE={info.world_size}; start ranks through launchers/node.sh")
    return info


def num_cores() -> int:
    """Cores that this process may use (a Slurm job may not use all of its node)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply_defaults() -> None:
    """Set the environment that the libraries read at import; what the user set stays."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "WORLD_SIZE" in os.environ and _integer("WORLD_SIZE") > 1:
        # Ranks share the cores; more threads than cores make gloo ranks wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def leave_at_once(code: int) -> NoReturn:
    """End a rank whose work is done, or given up, without taking the interpreter apart.

    Threads of gloo and torch that live on while it is taken apart now and then end it by `std::terminate`: a run that is DONE would be
    told as failed, and one that named its error as killed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # Whoever read them may be gone.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _integer(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a number; start ranks through launchers/node.sh")
    return int(text)
