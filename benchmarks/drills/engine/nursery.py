"""Ranks forked from a process that has imported everything: a start costs a second or two instead of ten.

The nursery is a process of its own with a single thread, no group of ranks and no file of a run. Each child becomes a rank by the
environment that a launcher would set, and runs the command's own `main`. A line of JSON asks for ranks or tells how one ended:

    {"ranks": [{"RANK": "0", ...}, ...], "words": ["pretrain", ...], "folder": ..., "log": ..., "fault": null | {...}}
    {"pids": [...]}
    {"ended": PID, "status": STATUS}
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[3]
_IMPORTED = (
    "megamm.cli",
    "megamm.train.pretrain",
    "megamm.train.data",
    "megamm.models.modeling_megamm",
    # Of DeepSpeed's initialization it is the import that costs: torch's compiler comes with it.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.siglip2.modeling_siglip2",
    "benchmarks.drills.engine.rank",
)
_LOOK_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1


class Nursery:
    """Starts ranks and hears how they end; a context manager, at whose end no rank is left. State: the process."""

    def __enter__(self) -> Nursery:
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._statuses: dict[int, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=CHECKOUT,
            env=os.environ | quiet,
            # Unbuffered, so that what was read is all that `select` does not see.
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        if self._hear() != {"ready": True}:
            raise RuntimeError("the nursery of ranks did not start; its words are above")
        return self

    def __exit__(self, *_: object) -> None:
        # The end of its input tells it to end its ranks, and then itself.
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Of the nursery's process."""
        return self._process.pid

    def start(
        self, ranks: Sequence[Mapping[str, str]], words: Sequence[str], *, folder: Path, log: Path, fault: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Fork a process a rank.

        Args:
            ranks: Environment of each rank.
            words: Of the command.
            folder: Working folder.
            log: Where output is appended.
            fault: What goes wrong, see `rank.FAULTS`.

        Returns:
            The processes, in the order of `ranks`; each leads a session of its own.
        """
        request = {"ranks": ranks, "words": words, "folder": str(folder), "log": str(log), "fault": fault}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        while "pids" not in (answer := self._hear()):
            self._statuses[answer["ended"]] = answer["status"]
        return answer["pids"]

    def status(self, pid: int) -> int | None:
        """How a rank ended: its exit code, or the negative signal; None while it runs."""
        while select.select([self._process.stdout], [], [], 0)[0]:
            answer = self._hear()
            self._statuses[answer["ended"]] = answer["status"]
        return self._statuses.get(pid)

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery of ranks ended; its words are above")
        return json.loads(line)


def main() -> None:
    """The nursery's process: fork what is asked for and tell what ended, until the input ends."""
    from megamm.core.env import apply_defaults

    apply_defaults()
    from megamm.engine.distributed import import_deepspeed

    import_deepspeed()
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, "a fork takes one thread along"
    _say({"ready": True})
    alive: set[int] = set()
    while True:
        if select.select([0], [], [], _LOOK_SECONDS)[0]:
            line = sys.stdin.buffer.readline()
            if not line:
                break
            request = json.loads(line)
            pids = [_fork(rank, request) for rank in request["ranks"]]
            alive |= set(pids)
            _say({"pids": pids})
        for pid in list(alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                alive.remove(pid)
                _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _fork(environment: dict[str, str], request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        # A drill that is killed itself leaves no ranks behind.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _redirect(Path(request["log"]))
        os.chdir(request["folder"])
        os.environ.update(environment)
        from benchmarks.drills.engine.rank import run

        status = run(request["words"], request["fault"])
    finally:
        sys.stderr.flush()
        os._exit(status)


def _redirect(log: Path) -> None:
    for descriptor, path, flags in ((0, Path(os.devnull), os.O_RDONLY), (1, log, os.O_APPEND), (2, log, os.O_APPEND)):
        opened = os.open(path, flags if flags == os.O_RDONLY else flags | os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)


if __name__ == "__main__":
    main()
