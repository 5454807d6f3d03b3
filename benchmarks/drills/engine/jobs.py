"""A run of the command under way: ranks forked by the nursery, or started by the launcher as a user does; how it ends, what it leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.drills.engine.nursery import CHECKOUT, Nursery

_LOOK_SECONDS = 0.02
_GRACE_SECONDS = 5.0
_WORDS_OF_LOG = 600


class Stuck(Exception):
    """Something did not come to pass in its time."""


def wait_until(is_so: Callable[[], Any], what: str, *, timeout_seconds: float = 240.0) -> Any:
    """Look until `is_so()` is true and return it.

    Raises:
        Stuck: It was not so in time.
    """
    end = time.monotonic() + timeout_seconds
    while not (answer := is_so()):
        if time.monotonic() > end:
            raise Stuck(f"{what} within {timeout_seconds:g} s")
        time.sleep(_LOOK_SECONDS)
    return answer


class Job:
    """Ranks of one run. A context manager, at whose end none of its processes is left; subclasses start them.

    Args:
        log: Where they write.
    """

    def __init__(self, log: Path):
        self.log = log

    def ranks(self) -> list[int]:
        """Processes of the ranks, in their order."""
        raise NotImplementedError

    def sessions(self) -> set[int]:
        """Sessions that hold every process of this job."""
        raise NotImplementedError

    def statuses(self) -> list[int | None]:
        """Exit codes or negative signals of what was started; None while it runs."""
        raise NotImplementedError

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            send(pid, signal.SIGKILL)
        wait_until(lambda: None not in self.statuses(), "a job that was killed ended")

    @property
    def is_over(self) -> bool:
        """Whether everything that was started has ended; after one failed, what is left is ended as the launcher would."""
        return None not in self.statuses()

    def wait(self, *, timeout_seconds: float = 240.0) -> list[int]:
        """Statuses at the end.

        Raises:
            Stuck: It went on for longer.
        """
        try:
            wait_until(lambda: self.is_over, "the job did not end", timeout_seconds=timeout_seconds)
        except Stuck as stuck:
            raise Stuck(f"{stuck}: {self.last_words()}") from None
        return [status for status in self.statuses() if status is not None]

    def until(self, is_so: Callable[[], Any], what: str) -> None:
        """Look until something is so while the job goes on, or the job is over.

        Raises:
            Stuck: Neither came to pass.
        """
        try:
            wait_until(lambda: self.is_over or is_so(), what)
        except Stuck as stuck:
            raise Stuck(f"{stuck}: {self.last_words()}") from None

    def stop(self) -> list[str]:
        """Ask every rank to stop; what is wrong with how they did.

        Raises:
            Stuck: They went on.
        """
        for pid in self.ranks():
            send(pid, signal.SIGTERM)
        statuses = self.wait()
        self.leave_nothing()
        return [f"ended with {statuses}: {self.last_words()}"] if any(statuses) else []

    def leave_nothing(self) -> None:
        """Wait until no process of it lives.

        Raises:
            Stuck: Some outlive it.
        """
        wait_until(lambda: not self.processes(), "the job's processes outlived it")

    def processes(self) -> list[int]:
        """Every process that lives of this job: ranks, their decoders, a launcher."""
        return in_sessions(self.sessions())

    def is_listening(self, number: int) -> bool:
        """Whether every rank handles a signal by now."""
        ranks = self.ranks()
        return bool(ranks) and all(_catches(pid, number) for pid in ranks)

    def last_words(self) -> str:
        """The end of the log, in one line."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return " ".join(text[-_WORDS_OF_LOG:].split())


class ForkedJob(Job):
    """Ranks out of the nursery. State: when one of them failed."""

    def __init__(
        self,
        nursery: Nursery,
        environments: Sequence[Mapping[str, str]],
        words: Sequence[str],
        *,
        folder: Path,
        log: Path,
        fault: Mapping[str, Any] | None,
    ):
        super().__init__(log)
        self._nursery = nursery
        self._pids = nursery.start(environments, words, folder=folder, log=log, fault=fault)
        self._failed: float | None = None

    def ranks(self) -> list[int]:  # noqa: D102, as the class above says
        return self._pids

    def sessions(self) -> set[int]:  # noqa: D102
        return set(self._pids)

    def statuses(self) -> list[int | None]:  # noqa: D102
        statuses = [self._nursery.status(pid) for pid in self._pids]
        if self._failed is None and any(statuses):
            self._failed = time.monotonic()
        if self._failed is not None and time.monotonic() > self._failed + _GRACE_SECONDS:
            for pid, status in zip(self._pids, statuses, strict=True):
                if status is None:
                    send(pid, signal.SIGKILL)
        return statuses


class LaunchedJob(Job):
    """`launchers/local.sh NUM megamm …` in a session of its own."""

    def __init__(self, num_ranks: int, words: Sequence[str], *, folder: Path, log: Path, environment: Mapping[str, str]):
        super().__init__(log)
        programs = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [CHECKOUT / "launchers" / "local.sh", str(num_ranks), "megamm", *words],
                cwd=folder,
                env=os.environ | programs | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._num_ranks = num_ranks

    @property
    def launcher(self) -> int:
        """The launcher's process, which leads its group."""
        return self._process.pid

    def ranks(self) -> list[int]:  # noqa: D102
        try:
            children = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []
        # The shell also forks programs of its own, to look around.
        return [child.pid for child in children if _is_python(child)][: self._num_ranks]

    def sessions(self) -> set[int]:  # noqa: D102
        return {self._process.pid}

    def statuses(self) -> list[int | None]:  # noqa: D102
        return [self._process.poll()]


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def in_sessions(sessions: Iterable[int]) -> list[int]:
    """Processes that live in some sessions; zombies wait for their parent alone and do not count."""
    wanted = set(sessions)
    return [pid for pid in psutil.pids() if _session(pid) in wanted and _state(pid) != "Z"]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _state(pid: int) -> str:
    return _fields(pid).get("State", "Z")[:1]


def _catches(pid: int, number: int) -> bool:
    return bool(int(_fields(pid).get("SigCgt", "0"), 16) >> (number - 1) & 1)


def _fields(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _is_python(process: psutil.Process) -> bool:
    try:
        return "python" in process.name() or "megamm" in process.name()
    except psutil.NoSuchProcess:
        return False
