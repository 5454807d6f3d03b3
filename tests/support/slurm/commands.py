"""What the tests say to a running Slurm, however its nodes are made."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
_T = TypeVar("_T", bound="Commands")


class Commands(ABC):
    """A cluster that runs between `__enter__` and `stop`; what it is made of is for the subclass to say.

    Attributes:
        nodes: Names of the nodes, in order.
        folder: Configuration, logs and state; removed at the end, also where this process is killed.
    """

    nodes: tuple[str, ...]
    folder: Path
    _keeper: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _start_command(self) -> list[str]:
        """What starts all daemons, makes the file `up`, and stays."""

    @abstractmethod
    def run(self, *command: str, check: bool = True, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command where the controller is.

        Raises:
            RuntimeError: It failed, and `check` was asked for; holds what it printed.
        """

    def __enter__(self: _T) -> _T:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster and remove its files; may be called again."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None, "the keeper is started with a pipe"
            self._keeper.stdin.close()
            self._keeper.wait()
            self._keeper = None
        elif hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def submit(self, *words: str, **options: Any) -> int:
        """`sbatch` with these words; the job's number."""
        return int(self.run("sbatch", "--parsable", *words, **options).stdout.strip().partition(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(number)).stdout
        return dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|\s*$)", text))

    def wait_for(self, number: int, *states: str, timeout: float = 120) -> dict[str, str]:
        """Poll until the job is in one of these states (`COMPLETED`, `FAILED`, `RUNNING`, …).

        Raises:
            TimeoutError: It is not by then; says where it stands.
        """
        end = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"job {number} is {job['JobState']} ({job.get('Reason')}), not {' or '.join(states)}, after {timeout} s")
            time.sleep(0.1)
        return job

    def tasks(self, job: int, word: str) -> dict[int, int]:
        """Rank -> process, as this machine numbers it, of a job's tasks whose command holds `word`."""
        mine = {f"SLURM_CONF={self.folder}/slurm.conf", f"SLURM_JOB_ID={job}"}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            # A process may end while it is looked at.
            with contextlib.suppress(OSError):
                words = set((folder / "environ").read_text(errors="replace").split("\0"))
                rank = next((each.partition("=")[2] for each in words if each.startswith("SLURM_PROCID=")), None)
                if rank is not None and mine <= words and word in (folder / "cmdline").read_text(errors="replace"):
                    parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
                    # What a task starts has its variables as well.
                    if parent and Path(f"/proc/{parent[1]}/comm").read_text().strip() == "slurmstepd":
                        found[int(rank)] = int(folder.name)
        return found

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Return when every node is up and has nothing to do."""
        self._wait(self._all_idle, "a node is not idle", timeout=timeout)

    def restart_controller(self) -> None:
        """Stop slurmctld, as an upgrade does, and start it from its saved state."""
        pid = (self.folder / "slurmctld.pid").read_text().strip()
        self.run("kill", "-TERM", pid)
        while not self.run("kill", "-0", pid, check=False).returncode:
            time.sleep(0.02)
        self.run("slurmctld")
        self._wait_until_answering()

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        """Variables of every command: this machine's, and where Slurm's settings are."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **(more or {})}

    def _start(self) -> None:
        start = self._start_command()
        command = [sys.executable, str(HERE / "keeper.py"), str(self.folder), *start]
        with (self.folder / "console").open("wb") as console:
            self._keeper = subprocess.Popen(
                command, env=self.environment(), stdin=subprocess.PIPE, stdout=console, stderr=console, start_new_session=True
            )
        self._wait(lambda: (self.folder / "up").exists(), "the daemons did not start")
        self._wait_until_answering()
        self.wait_until_idle()

    def _wait_until_answering(self) -> None:
        self._wait(lambda: self.run("scontrol", "ping", check=False).stdout.rstrip().endswith("UP"), "the controller does not answer")

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).stdout.split()
        return len(states) == len(self.nodes) and set(states) == {"idle"}

    def _wait(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if (self.folder / "dead").exists() or time.monotonic() > end:
                logs = [path for path in (self.folder / "console", self.folder / "slurmctld.log") if path.exists()]
                tails = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in logs)
                raise RuntimeError(f"{what}\n{tails}")
            time.sleep(0.02)


def checked(result: subprocess.CompletedProcess[str], *, check: bool) -> subprocess.CompletedProcess[str]:
    """The result of a command, or a RuntimeError with what it printed."""
    if check and result.returncode:
        raise RuntimeError(f"{' '.join(result.args)} ended with {result.returncode}: {result.stderr.strip()} {result.stdout.strip()}")
    return result
