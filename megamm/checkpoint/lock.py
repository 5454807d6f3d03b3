"""One job a run: who owns a run folder, when it may be taken over, and how an owner learns that it was.

    RUN/.lock/00000007.owner   who the seventh owner is; to make this file is to own the run
    RUN/.lock/00000007.lease   a count that the owner's heartbeat moves

The owner's number is lock and fence in one: it is taken by linking a file to a name that must not exist, which is atomic on every
file system that clusters use (`flock` is not, over NFS), and whoever sees a higher number than its own has lost the run.

No clock is compared with another machine's. A newcomer watches the count against its own clock: while it moves, the owner
lives, and the newcomer is refused; when it stood still for the whole lease, the owner lost the run. Where more is known,
nobody waits: the owner left in order, the scheduler says that its job ended, or its process is gone from this very machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shutil
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from megamm.checkpoint.fence import LOCK, Fence, newest_owner, owner_path, starts
from megamm.checkpoint.seal import opened, sealed
from megamm.core.errors import CheckpointError
from megamm.core.files import sync_folder, write_text
from megamm.core.logging import get_logger

_log = get_logger("checkpoint")
_BEATS_A_LEASE = 12
_MAX_VANISHED = 20
# Of a job in these states a process may still run. A job that waits to be started again has none.
_LIVE_STATES = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})


class LostRun(CheckpointError):
    """This process owned a run and does no more: it must not write to it again."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns a run.

    Attributes:
        job_id: Of the scheduler; empty without one.
        restart_count: How often the scheduler had restarted that job.
        cluster: Of the scheduler.
        host: Name of the machine.
        boot: What tells this boot and these processes from another's: boot id and process namespace.
        pid: Process.
        pid_started: When that process began, so that a number that is used again is no sign of life; in seconds since the boot, because
            times of day move with the clock.
        since: Local time, for people.
        lease_seconds: How long it may be silent.
        starts: (number, step) of every owner up to this one that went on from a step.
        is_released: It left in order.
    """

    job_id: str
    restart_count: int
    cluster: str
    host: str
    boot: str
    pid: int
    pid_started: float
    since: str
    lease_seconds: float
    starts: list[tuple[int, int]] = field(default_factory=list)
    is_released: bool = False

    @classmethod
    def this_process(cls, lease_seconds: float) -> Owner:
        """The owner that this process would be."""
        fence = Fence.of_environment(0)
        return cls(
            job_id=fence.job_id,
            restart_count=fence.restart_count,
            cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
            host=platform.node(),
            boot=_boot(),
            pid=os.getpid(),
            pid_started=_started(psutil.Process()),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            lease_seconds=lease_seconds,
        )

    def __str__(self) -> str:
        job = f"job {self.job_id} (restart {self.restart_count})" if self.job_id else "a process without a scheduler"
        return f"{job} on {self.host}, pid {self.pid}, since {self.since}"


class RunLock:
    """The ownership of a run by this process, kept alive by a thread. `acquire` makes it.

    State: this owner's number and a count that only grows. Losing the run is for good: a later `check` never takes it back.
    """

    def __init__(self, run: Path, number: int, owner: Owner):
        self.number = number
        self._run = run
        self._owner = owner
        self._num_beats = 0
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(owner.lease_seconds / _BEATS_A_LEASE,), name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, run: Path, *, lease_seconds: float) -> RunLock:
        """Become the run's owner; blocks for up to a lease where only silence can tell that the last owner is gone.

        Raises:
            CheckpointError: Somebody else owns the run and lives; says who.
        """
        num_vanished = 0
        while True:
            try:
                (run / LOCK).mkdir(parents=True, exist_ok=True)
                last = newest_owner(run)
                if last:
                    _require_gone(run, last)
                owner = _with_starts(Owner.this_process(lease_seconds), run)
                # Before the owner: whoever finds the one finds the other.
                _move_lease(lease_path(run, last + 1), 0)
                if _create(owner_path(run, last + 1), owner):
                    _forget_before(run, last)
                    return cls(run, last + 1, owner)
            except (FileNotFoundError, FileExistsError):
                # An owner that began nothing took its files and the folder with it, this moment: looked at anew. A folder that is there
                # when it is made and gone when it is looked at is the latter error.
                num_vanished += 1
                if num_vanished == _MAX_VANISHED or (run / LOCK).is_file():
                    raise
                time.sleep(0.05 * num_vanished)

    def started_at(self, step: int) -> None:
        """Record that this owner goes on from `step`: what earlier owners commit beyond it does not count."""
        self._owner = _with_starts(self._owner, self._run, (self.number, step))
        write_text(owner_path(self._run, self.number), sealed(asdict(self._owner)))

    def check(self) -> None:
        """Ask whether the run is still this process's.

        Raises:
            LostRun: Somebody took it over; says who.
        """
        # A change in the folder makes an NFS client look at it anew; its cached listing may be a minute old.
        self._beat()
        newest = newest_owner(self._run)
        if newest > self.number:
            raise LostRun(f"{self._run} was taken over by {read_owner(self._run, newest)}; this job must not write to it and ends")

    def release(self) -> None:
        """Leave in order, so that the next owner need not wait. A folder that was new and where nothing began is as it was."""
        self._ended.set()
        self._thread.join()
        try:
            if self.number == 1 and not self._owner.starts:
                self._leave_no_trace()
            elif newest_owner(self._run) == self.number:
                write_text(owner_path(self._run, self.number), sealed(asdict(replace(self._owner, is_released=True))))
        except OSError as error:
            _log.warning("%s keeps its owner until the lease runs out: %s", self._run, error)

    def _leave_no_trace(self) -> None:
        # The owner last: once it is gone the next one takes this very number, and the lease would be the next one's.
        for path in (lease_path(self._run, self.number), owner_path(self._run, self.number)):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Only what is empty: another job may be at the door already, and a run's folder holds more.
            (self._run / LOCK).rmdir()
            self._run.rmdir()

    def _keep(self, interval_seconds: float) -> None:
        while not self._ended.wait(interval_seconds):
            try:
                self._beat()
            except OSError as error:
                _log.warning("the lease of %s was not renewed: %s", self._run, error)

    def _beat(self) -> None:
        with self._mutex:
            self._num_beats += 1
            _move_lease(lease_path(self._run, self.number), self._num_beats)


def lease_path(run: Path, number: int) -> Path:
    """The file that the heartbeat of owner `number` renames anew."""
    return owner_path(run, number).with_suffix(".lease")


def _move_lease(path: Path, count: int) -> None:
    """Renamed, so that no reader finds half a number; not synced, because a sync waits for all that a save is writing."""
    draft = _draft(path)
    try:
        draft.write_text(f"{count}\n", encoding="utf-8")
    except OSError as error:
        draft.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        # A full disk has room for the bytes that are there already, and a run that goes on must not lose its lease to it.
        with path.open("r+", encoding="utf-8") as file:
            file.write(f"{count}\n")
        return
    draft.replace(path)


def _draft(path: Path) -> Path:
    """A name that nobody else writes to: processes of several hosts, and of several containers of one host, have equal numbers."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _create(path: Path, owner: Owner) -> bool:
    """Make the owner's file where it must not exist; False where somebody was faster."""
    draft = _draft(path)
    with draft.open("w", encoding="utf-8") as file:
        file.write(sealed(asdict(owner)))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        # The server may have made the link and its answer been lost, whereupon the client asked again.
        if draft.stat().st_nlink != 2:
            return False
    finally:
        draft.unlink()
    sync_folder(path.parent)
    return True


def _with_starts(owner: Owner, run: Path, *more: tuple[int, int]) -> Owner:
    return replace(owner, starts=[*starts(run), *more])


def _forget_before(run: Path, number: int) -> None:
    """Delete the files of owners before `number`: they are gone, and what counts of them is in the newest owner's file."""
    for path in (run / LOCK).iterdir():
        # Begins with a dot where an owner died while it wrote.
        owner = path.name.removeprefix(".")[:8]
        if owner.isdigit() and int(owner) < number:
            path.unlink(missing_ok=True)


def read_owner(run: Path, number: int) -> Owner:
    """Who owner `number` of a run is.

    Raises:
        CheckpointError: Its file cannot be read.
    """
    try:
        return _owner_of(owner_path(run, number))
    except FileNotFoundError as error:
        raise _unreadable(owner_path(run, number), error) from error


def _owner_of(path: Path) -> Owner:
    """As `read_owner`, but a file that is not there is a FileNotFoundError."""
    try:
        return Owner(**opened(path.read_bytes()))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}); remove it when no job uses the run")


def _require_gone(run: Path, number: int) -> None:
    owner = _owner_of(owner_path(run, number))
    if owner.is_released:
        return
    if reason := _gone(owner):
        _log.warning("taking %s over from %s: %s", run, owner, reason)
        return
    _log.warning("%s may be in use by %s: watching for up to %g s", run, owner, owner.lease_seconds)
    if _moves(lease_path(run, number), owner.lease_seconds):
        raise CheckpointError(f"{run} is in use by {owner}; wait for its end, cancel it, or name another --run")
    _log.warning("taking %s over from %s: silent for %g s", run, owner, owner.lease_seconds)


def _moves(path: Path, seconds: float) -> bool:
    """Watch a lease; opening the file each time makes an NFS client ask the server."""
    first = _count(path)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(0.5, seconds / (2 * _BEATS_A_LEASE)))
        if _count(path) != first:
            return True
    return False


def _count(path: Path) -> bytes:
    """As it lies there: only whether it changes is asked, also of one that is damaged."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _gone(owner: Owner) -> str:
    """What proves that an owner is gone; empty where nothing does."""
    own = Owner.this_process(0.0)
    if owner.job_id and owner.cluster == own.cluster:
        if owner.job_id == own.job_id:
            if owner.restart_count < own.restart_count:
                return f"the scheduler has restarted job {own.job_id}"
        elif (states := _job_states(owner.job_id)) is not None and not states & _LIVE_STATES:
            return f"the scheduler says that job {owner.job_id} is {' and '.join(sorted(states))}"
    if is_gone_from_here(owner):
        return f"process {owner.pid} is gone"
    return ""


def is_gone_from_here(owner: Owner) -> bool:
    """Whether an owner was a process of this very machine and is no more; False where only another machine could tell."""
    own = Owner.this_process(0.0)
    return owner.host == own.host and owner.boot == own.boot and not _is_alive(owner)


def _job_states(job_id: str) -> set[str] | None:
    """What Slurm says of a job: its state, `UNKNOWN` for one that it has forgotten; None where it does not answer.

    Several for an array whose last task bears the array's own number: nobody can say which of them it is.
    """
    program = shutil.which("squeue")
    if program is None:
        return None
    command = [program, "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0:
        return {"UNKNOWN"} if "Invalid job id" in answer.stderr else None
    return set(answer.stdout.split()) or {"UNKNOWN"}


def _is_alive(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        return abs(_started(process) - owner.pid_started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _started(process: psutil.Process) -> float:
    """When a process began.

    psutil counts from the time of day of the boot, which the kernel moves when the clock is set: a live owner would look like
    another process afterwards.

    Source: proc_pid_stat(5), `starttime`.
    """
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return process.create_time()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _boot() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    parts = [boot_id.read_text().strip() if boot_id.is_file() else str(int(psutil.boot_time()))]
    if namespace.is_symlink():
        parts.append(str(namespace.readlink()))
    return " ".join(parts)
