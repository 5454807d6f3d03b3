"""What one task measures of its node by itself: disks, memory, speed, software, and whether it sees the same run and data."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megamm.checkpoint.manifest import software_versions
from megamm.config import Recipe, to_dict
from megamm.core.env import RankInfo
from megamm.core.errors import MegaMMError
from megamm.core.files import canonical_json, digest_file, digest_text
from megamm.data.samples.datasets import find_shards
from megamm.data.shards.index import index_path
from megamm.preflight import gpus
from megamm.preflight.meeting import node_name

_MIB = 1 << 20
_CPU_SIZE, _GPU_SIZE = 768, 8192
_NUM_PRODUCTS = 8


def node_facts(recipe: Recipe, run: Path, info: RankInfo) -> dict[str, Any]:
    """Facts of this task and its node as JSON values; what could not be found out is an entry of `problems`.

    Args:
        recipe: What is to be trained.
        run: The run folder; its file system is measured.
        info: This task.
    """
    problems: list[str] = []
    facts = {
        "node": node_name(),
        "local_rank": info.local_rank,
        "num_devices": torch.cuda.device_count(),
        "software": software_versions(),
        "recipe": digest_text(canonical_json(to_dict(recipe))),
        "gflops": _tried(problems, "a matrix product", matmul_gflops, info.local_rank),
    }
    if info.local_rank == 0:
        found = gpus.look()
        if found.num_gpus and not facts["num_devices"] and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            # Training would go on, on the CPU.
            problems.append(
                f"nvidia-smi lists {found.num_gpus} GPUs and torch {torch.__version__} sees none; is it built for driver {found.driver}?"
            )
        # Once a node: tasks side by side would measure each other.
        size = recipe.preflight.write_mib * _MIB
        facts |= {
            "gpus": found.to_json(),
            "run_disk": _tried(problems, f"{run}", disk, run, size),
            "scratch_disk": _tried(problems, "the folder of temporary files", disk, Path(tempfile.gettempdir()), size),
            "memory_gib": round(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "shared_memory_gib": round(shutil.disk_usage("/dev/shm").free / 2**30, 2) if Path("/dev/shm").is_dir() else 0.0,
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "data": _tried(problems, "the data", data_digest, recipe),
        }
    return facts | {"problems": problems}


def matmul_gflops(local_rank: int) -> float:
    """Speed of this task's device, in 10^9 multiplications and additions a second: the best of some products, which noise cannot raise."""
    has_gpu = torch.cuda.is_available()
    if has_gpu and local_rank >= torch.cuda.device_count():
        return 0.0
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    size, dtype = (_GPU_SIZE, torch.bfloat16) if has_gpu else (_CPU_SIZE, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    product, best = matrix, float("inf")
    for _ in range(_NUM_PRODUCTS):
        start = time.perf_counter()
        product = matrix @ matrix
        # Reading a value waits for the device.
        float(product[0, 0])
        best = min(best, time.perf_counter() - start)
    if wrong := int((product != size).sum()):
        raise MegaMMError(f"{wrong} of {size * size} sums of {size} ones are wrong: this device computes wrongly")
    return round(2 * size**3 / best / 1e9, 1)


def disk(folder: Path, num_bytes: int) -> dict[str, float]:
    """Free space in GiB and the speed of writing and syncing a file, in MiB a second, where `folder` lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    block, speeds = os.urandom(_MIB), []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(3):
            file.seek(0)
            start = time.perf_counter()
            for _ in range(max(1, num_bytes // _MIB)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speeds.append(max(1, num_bytes // _MIB) / (time.perf_counter() - start))
    usage = shutil.disk_usage(folder)
    return {"free_gib": round(usage.free / 2**30, 1), "write_mib_per_second": round(statistics.median(speeds), 1)}


def data_digest(recipe: Recipe) -> str:
    """What this node sees of tokenizer and data: names and sizes of all shards and of their indexes.

    Contents are checked where they are read.
    """
    root, parts = Path(recipe.data.root), []
    for name, dataset in sorted({**recipe.data.train, **recipe.data.held_out}.items()):
        for shard in find_shards(name, dataset, root, reading=recipe.data.reading):
            files = [path for path in (shard, index_path(shard)) if isinstance(path, Path)]
            parts.append([name, str(shard), *(path.stat().st_size for path in files)])
    tokenizer = Path(recipe.tokenizer.folder) / "tokenizer.json"
    if tokenizer.is_file():
        parts.append([tokenizer.name, digest_file(tokenizer)])
    return digest_text(canonical_json(parts))


def _tried(problems: list[str], what: str, measure: Callable[..., Any], *arguments: Any) -> Any:
    """What a measurement gives; where it fails that is one more problem of this node."""
    try:
        return measure(*arguments)
    except (OSError, RuntimeError, MegaMMError) as error:
        problems.append(f"{what}: {str(error).strip().partition(chr(10))[0]}")
        return None
