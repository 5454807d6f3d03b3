"""What one task measures of its node by itself: memory, speed, software, and whether it sees the same run and data."""

from __future__ import annotations

import os
import resource
import shutil
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
from megamm.preflight.disks import tried
from megamm.preflight.meeting import node_name
from megamm.preflight.stopwatch import seconds_of

_CPU_SIZE, _GPU_SIZE = 768, 8192
# A GPU's clock needs some tenths of a second to rise.
_NUM_CPU_PRODUCTS, _NUM_GPU_PRODUCTS = 8, 200


def node_facts(recipe: Recipe, info: RankInfo, at_work: Callable[[], None]) -> dict[str, Any]:
    """Facts of this task and its node as JSON values; what could not be found out is an entry of `problems`.

    Args:
        recipe: What is to be trained.
        info: This task.
        at_work: Called after each piece of what may take minutes.
    """
    problems: list[str] = []
    facts = {
        "node": node_name(),
        "local_rank": info.local_rank,
        "num_devices": torch.cuda.device_count(),
        "software": software_versions(),
        "recipe": digest_text(canonical_json(to_dict(recipe))),
        "gflops": tried(problems, "a matrix product", matmul_gflops, info.local_rank),
    }
    at_work()
    if info.local_rank == 0:
        # After the product: a GPU at rest has low clocks, and nothing slows it down.
        found = gpus.look()
        at_work()
        if found.num_gpus and not facts["num_devices"] and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            # Training would go on, on the CPU.
            problems.append(
                f"nvidia-smi lists {found.num_gpus} GPUs and torch {torch.__version__} sees none; is it built for driver {found.driver}?"
            )
        facts |= {
            "gpus": found.to_json(),
            "memory_gib": round(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "shared_memory_gib": round(shutil.disk_usage("/dev/shm").free / 2**30, 2) if Path("/dev/shm").is_dir() else 0.0,
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "data": tried(problems, "the data", data_digest, recipe, at_work),
        }
    return facts | {"problems": problems}


def matmul_gflops(local_rank: int) -> float:
    """Speed of this task's device, in 10^9 multiplications and additions a second: the best of some products, which noise cannot raise."""
    has_gpu = torch.cuda.is_available()
    if has_gpu and local_rank >= torch.cuda.device_count():
        return 0.0
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    size, dtype = (_GPU_SIZE, torch.bfloat16) if has_gpu else (_CPU_SIZE, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    product = torch.empty_like(matrix)
    num_products = _NUM_GPU_PRODUCTS if has_gpu else _NUM_CPU_PRODUCTS
    best = min(seconds_of(lambda: torch.mm(matrix, matrix, out=product), device) for _ in range(num_products))
    if wrong := int((product != size).sum()):
        raise MegaMMError(f"{wrong} of {size * size} sums of {size} ones are wrong: this device computes wrongly")
    return round(2 * size**3 / best / 1e9, 1)


def data_digest(recipe: Recipe, at_work: Callable[[], None]) -> str:
    """What this node sees of tokenizer and data: names and sizes of all shards and of their indexes.

    Contents are checked where they are read. Many shards take minutes, and so do their indexes where they are fetched first.

    Args:
        recipe: Its data and tokenizer.
        at_work: Called after each index that was fetched and each shard.
    """
    root, parts = Path(recipe.data.root), []
    for name, dataset in sorted({**recipe.data.train, **recipe.data.held_out}.items()):
        for shard in find_shards(name, dataset, root, reading=recipe.data.reading, on_index=at_work):
            files = [path for path in (shard, index_path(shard)) if isinstance(path, Path)]
            parts.append([name, str(shard), *(path.stat().st_size for path in files)])
            at_work()
    tokenizer = Path(recipe.tokenizer.folder) / "tokenizer.json"
    if tokenizer.is_file():
        parts.append([tokenizer.name, digest_file(tokenizer)])
    return digest_text(canonical_json(parts))
