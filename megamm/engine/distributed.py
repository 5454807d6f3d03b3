"""The group of ranks: how it starts, the few collectives that other rooms need, and how it fails together.

What crosses ranks here is float64 sums and JSON, through host memory, so that nothing is pickled and nothing waits for a
stream of the device. On GPUs the group carries two backends: gloo for these, NCCL for DeepSpeed's tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.core import errors
from megamm.core.env import RankInfo, rank_info
from megamm.core.errors import ConfigError, MegaMMError, may_pass
from megamm.core.files import canonical_json

_ERROR_CLASSES = {
    kind.__name__: kind
    for kind in (errors.ConfigError, errors.DataError, errors.UnreachableData, errors.CheckpointError, errors.ExportError)
}


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks that train together.

    Attributes:
        rank: Global rank, from 0.
        local_rank: Rank on this node.
        size: Number of ranks.
        device: Where this rank computes.
        backend: `nccl` or `gloo`, what carries DeepSpeed's tensors.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str

    @property
    def is_main(self) -> bool:
        """True on the rank that writes what is written once."""
        return self.rank == 0


def start(*, timeout_seconds: float = 1800.0) -> World:
    """Join the ranks that the launcher names in the environment; without a launcher be a world of one.

    Args:
        timeout_seconds: A collective that waits longer fails instead of hanging.

    Raises:
        ConfigError: The environment names only a part of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT,
            or there are more ranks on this node than GPUs.
    """
    info = rank_info()
    device = _device(info)
    deepspeed = import_deepspeed()
    # DeepSpeed calls collectives under names that torch renamed: one warning a call otherwise.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    # DeepSpeed reads these even where one process is the whole world.
    os.environ.update(RANK=str(info.rank), LOCAL_RANK=str(info.local_rank), WORLD_SIZE=str(info.world_size))
    if not dist.is_initialized():
        _join(info, device, timedelta(seconds=timeout_seconds))
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The shared-memory collectives of the CPU accelerator are compiled at first use and are no faster: never build them.
    import deepspeed.ops as operators

    operators.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
    return World(rank=info.rank, local_rank=info.local_rank, size=info.world_size, device=device, backend=backend)


def import_deepspeed() -> Any:
    """Import deepspeed with the environment that it reads at import: accelerator, build folder, log level.

    A build folder of its own for every process, because a lock file that a killed build left behind hangs the next one.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(tempfile.gettempdir()) / f"megamm-extensions-{os.getuid()}-{os.getpid()}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    return deepspeed


def _device(info: RankInfo) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if info.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={info.local_rank} has no GPU, this node shows {torch.cuda.device_count()}; start one rank a GPU, "
            "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", info.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(info: RankInfo, device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if info.world_size == 1:
        # No port: a child process that inherits this environment must be able to start beside its parent.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not set for WORLD_SIZE={info.world_size}; start ranks through launchers/node.sh")
    dist.init_process_group(backend, init_method="env://", rank=info.rank, world_size=info.world_size, timeout=timeout)


def stop() -> None:
    """Leave the group, all ranks together. Not for error paths: there a rank that waits would never be answered."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_sum([0.0])


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sum of each value over all ranks, in float64; the same bits on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def agree(flag: bool) -> bool:
    """True on every rank when `flag` is true on any."""
    return all_reduce_sum([float(flag)])[0] > 0


def gather_json(value: Any) -> list[Any]:
    """Every rank's JSON value in the order of ranks, on every rank."""
    data = canonical_json(value).encode()
    num_bytes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    num_bytes[dist.get_rank()] = len(data)
    dist.all_reduce(num_bytes)
    longest = int(num_bytes.max())
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in num_bytes]
    dist.all_gather(parts, own)
    return [json.loads(part[:count].numpy().tobytes()) for part, count in zip(parts, num_bytes.tolist(), strict=True)]


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank; what the others pass is ignored."""
    data = canonical_json(value).encode() if dist.get_rank() == 0 else b""
    num_bytes = torch.tensor([len(data)])
    dist.broadcast(num_bytes, src=0)
    if dist.get_rank() == 0:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    else:
        buffer = torch.empty(int(num_bytes), dtype=torch.uint8)
    dist.broadcast(buffer, src=0)
    return json.loads(buffer.numpy().tobytes())


def num_collectives() -> int:
    """Collectives that this rank began, in all groups, DeepSpeed's included: a rank that is behind the others misses one.

    Asked from any thread, at any time; it costs microseconds and nothing is sent.
    """
    groups = list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []
    # A group has a backend a kind of device, the same one twice where gloo does both.
    backends = {group._get_backend(device) for group in groups for device in group._device_types}
    return sum(backend._get_sequence_number_for_group() for backend in backends)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """A section in which an error of one rank becomes an error of every rank, at its end.

    The section itself must not hold collectives: the ranks that are well would wait in them for the one that failed.

    Raises:
        MegaMMError: On the ranks that were well: the first failed rank's error, of the same class where it is one of ours.
            The failed ranks raise their own.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    reports = gather_json(None if failure is None else [type(failure).__name__, str(failure), may_pass(failure)])
    if failure is not None:
        if isinstance(failure, MegaMMError):
            failure.on_all_ranks = True
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            name, message, passes = report
            error = _ERROR_CLASSES[name](message) if name in _ERROR_CLASSES else MegaMMError(f"rank {rank} failed with {name}: {message}")
            error.on_all_ranks, error.may_pass = True, passes
            raise error
