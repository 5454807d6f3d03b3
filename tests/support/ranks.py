"""Run a test's function on several gloo ranks, in processes of their own, under a watchdog.

`run_ranks(function, 2, argument, ...)` starts two processes with the environment that a launcher sets, calls
`function(*arguments)` in each, and returns the JSON values by rank. The function lives at the top level of a test module;
it starts the world itself. Importing torch and deepspeed costs seconds a process, so one function should check several things.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class RanksFailed(AssertionError):
    """A rank ended with an error, or the ranks hung."""


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Call `function` on `world_size` ranks and return what each returned.

    Args:
        function: At the top level of its module; takes and returns JSON values (paths as strings).
        world_size: Number of processes.
        arguments: Passed to every rank.
        timeout_seconds: Ranks that run longer are killed and fail the test.

    Raises:
        RanksFailed: With the last lines of every rank's standard error.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        task = {"file": inspect.getfile(function), "function": function.__qualname__, "arguments": arguments}
        (folder / "task.json").write_text(json.dumps(task))
        port = free_port()
        children = [_start(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            problem = _watch(children, timeout_seconds)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
        if problem:
            raise RanksFailed("\n".join([problem, *(_tail(folder, rank) for rank in range(world_size))]))
        return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world_size)]


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment of one rank on the CPU."""
    ranks = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return os.environ | ranks | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}


def _start(folder: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[bytes]:
    with (folder / f"output_{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            env=rank_environment(rank, world_size, port),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _watch(children: list[subprocess.Popen[bytes]], timeout_seconds: float) -> str:
    """Wait for all; after a first failure the others get a moment to report their own. Returns what went wrong, or nothing."""
    end = time.monotonic() + timeout_seconds
    problem = ""
    while any(child.poll() is None for child in children):
        if time.monotonic() > end:
            return problem or f"ranks still ran after {timeout_seconds} seconds: they hang"
        if not problem and any(child.poll() for child in children):
            problem = f"ranks ended with {[child.poll() for child in children]}"
            end = min(end, time.monotonic() + 10.0)
        time.sleep(0.02)
    return problem or ("" if not any(child.returncode for child in children) else f"ranks ended with {[c.returncode for c in children]}")


def _tail(folder: Path, rank: int) -> str:
    text = (folder / f"output_{rank}.txt").read_text(errors="replace")
    return f"--- rank {rank} ---\n{text[-6000:]}"


def _main(folder: Path, rank: int) -> None:
    task = json.loads((folder / "task.json").read_text())
    spec = importlib.util.spec_from_file_location("test_on_ranks", task["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_on_ranks"] = module
    spec.loader.exec_module(module)
    result = getattr(module, task["function"])(*task["arguments"])
    (folder / f"result_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    from megamm.core.env import apply_defaults, leave_at_once

    apply_defaults()
    status = 1
    try:
        _main(Path(sys.argv[1]), int(sys.argv[2]))
        status = 0
    except BaseException:
        traceback.print_exc()
    leave_at_once(status)
