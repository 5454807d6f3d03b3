"""A Slurm cluster of several nodes on one machine: real daemons, real jobs, fake GPUs.

Each node has its own host name, address, process space and shared memory, behind a bridge inside namespaces of the cluster. Nothing
of it is visible outside, several clusters run at once with the same addresses, and killing one process ends all of it.

The settings are those of a production cluster where they matter (freezer tracking, requeues, return to service), with waits cut short.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "pgrep")
_PACKAGES = ("slurm-wlm", "munge", "iproute2", "procps")
_FREEZER = Path("/sys/fs/cgroup/freezer")
_PROBE = """mount --make-rprivate /; mount -t tmpfs probe /mnt; hostname probe
ip link add switch type bridge; ip link add cable type veth peer name plug"""

_SLURM_CONF = """\
ClusterName={tag}
SlurmctldHost=controller(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
JobRequeue=1
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,nohold_on_prolog_fail
KillWait=5
CompleteWait=0
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
InactiveLimit=0
Waittime=0
TreeWidth=64
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=graceful Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can run here, in one line; None where it can."""
    if os.geteuid():
        return "a test cluster needs root (namespaces, a bridge)"
    if absent := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(absent)} not installed: apt-get install {' '.join(_PACKAGES)}"
    words = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc", "sh", "-ec", _PROBE]
    probe = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"this kernel gives no namespaces, mounts or bridges: {probe.stderr.strip()}" if probe.returncode else None


def install() -> None:
    """Install Slurm where root and apt are at hand; what is missing afterwards is for `missing` to say."""
    if os.geteuid() or shutil.which("apt-get") is None or all(map(shutil.which, _PROGRAMS)):
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # No daemon of the system's own may start along with the packages.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *_PACKAGES]):
            subprocess.run(["apt-get", *words], env=quiet, stdout=subprocess.DEVNULL, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if made:
            policy.unlink()


class Cluster:
    """A running cluster; a context manager.

    Attributes:
        nodes: Names of the nodes, in order.
        has_freezer: Whether job steps are tracked by the freezer, which no process escapes.
        folder: Configuration, logs and state; removed at the end.
    """

    def __init__(self, num_nodes: int = 2, *, gpus_per_node: int = 2, cpus_per_node: int = 4):
        self._tag = "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz") for _ in range(4))
        self.nodes = tuple(f"{self._tag}{number}" for number in range(1, num_nodes + 1))
        self._gpus, self._cpus = gpus_per_node, cpus_per_node
        # Short, because the path of a socket has 108 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix=f"slurm-{self._tag}-", dir="/tmp"))
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster and remove its files; may be called again."""
        if self._process is not None:
            # The controller is PID 1 of its namespace: with it the kernel kills all below, and waits for their end.
            self._process.kill()
            self._process.wait()
            self._process = None
        if (freezer := self.folder / "freezer").is_symlink():
            _remove_cgroup(freezer.resolve())
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, *command: str, node: str | None = None, check: bool = True, timeout: float = 60, **options
    ) -> subprocess.CompletedProcess:
        """Run a command on the controller, or on a node.

        Raises:
            RuntimeError: It failed, and `check` was asked for; holds what it printed.
        """
        pid = self._pid(node)
        words = ["nsenter", "--target", str(pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--", *command]
        result = subprocess.run(
            words, env=self.environment(options.pop("env", {})), capture_output=True, text=True, timeout=timeout, **options
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: {result.stderr.strip()} {result.stdout.strip()}")
        return result

    def submit(self, *words: str, **options) -> int:
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

    def wait_until_idle(self) -> None:
        """Return when every node is up and has nothing to do."""
        self._wait(self._all_idle, "a node is not idle", timeout=60)

    def power_off(self, node: str) -> None:
        """Cut the power: every process of the node dies at once, and nothing is said to anybody."""
        os.kill(self._pid(node), signal.SIGKILL)
        (self.folder / f"{node}.pid").unlink()

    def power_on(self, node: str) -> None:
        """Boot a node again."""
        self.run("bash", str(HERE / "power_on.sh"), str(self.folder), node, str(self.nodes.index(node) + 1))

    def unplug(self, node: str) -> None:
        """Cut the node's cable; what runs there goes on."""
        self.run("ip", "link", "set", f"cable{self.nodes.index(node) + 1}", "down")

    def plug_in(self, node: str) -> None:
        """Mend the cable."""
        self.run("ip", "link", "set", f"cable{self.nodes.index(node) + 1}", "up")

    def restart_controller(self) -> None:
        """Stop slurmctld, as an upgrade does, and start it from its saved state."""
        self.run("pkill", "-TERM", "-x", "slurmctld")
        while not self.run("pgrep", "-x", "slurmctld", check=False).returncode:
            time.sleep(0.02)
        self.run("slurmctld")
        self._wait_until_answering()

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        """Variables of every command: this machine's, and where Slurm's settings are."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **(more or {})}

    def _configure(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        # slurmd takes host names from here as a user's programs do.
        addresses = {"controller": "10.77.0.1", **{node: f"10.77.0.{number}" for number, node in enumerate(self.nodes, start=2)}}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        nodes = [
            f"NodeName={node} NodeAddr={addresses[node]} CPUs={self._cpus} RealMemory=8000 Gres=gpu:{self._gpus} State=UNKNOWN"
            for node in self.nodes
        ]
        self.has_freezer = has_freezer = os.access(_FREEZER, os.W_OK) and (_FREEZER / "cgroup.procs").exists()
        proctrack = "proctrack/cgroup" if has_freezer else "proctrack/linuxproc"
        if has_freezer:
            cgroup = _FREEZER / f"megamm-{self._tag}"
            cgroup.mkdir()
            (folder / "freezer").symlink_to(cgroup)
            (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n")
        (folder / "slurm.conf").write_text(_SLURM_CONF.format(tag=self._tag, folder=folder, proctrack=proctrack, nodes="\n".join(nodes)))
        # A device must be one: with plain files Slurm sets no CUDA_VISIBLE_DEVICES.
        for gpu in range(self._gpus):
            (folder / f"gpu{gpu}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{self._gpus - 1}]\n" if self._gpus else "")

    def _start(self) -> None:
        words = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*words, "bash", str(HERE / "controller.sh"), str(self.folder), *self.nodes]
        with (self.folder / "console").open("wb") as console:
            self._process = subprocess.Popen(
                command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        self._wait(lambda: (self.folder / "up").exists(), "the daemons did not start")
        self._wait_until_answering()
        self.wait_until_idle()

    def _wait_until_answering(self) -> None:
        self._wait(lambda: self.run("scontrol", "ping", check=False).stdout.rstrip().endswith("UP"), "the controller does not answer")

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).stdout.split()
        return len(states) == len(self.nodes) and set(states) == {"idle"}

    def _wait(self, condition, what: str, timeout: float = 30) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if self._process is None or self._process.poll() is not None or time.monotonic() > end:
                logs = [path for path in (self.folder / "console", self.folder / "slurmctld.log") if path.exists()]
                tails = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in logs)
                raise RuntimeError(f"{what}\n{tails}")
            time.sleep(0.02)

    def _pid(self, node: str | None) -> int:
        """PID 1 of the controller or of a node, as this machine numbers it."""
        assert self._process is not None, "the cluster is not running"
        controller = int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])
        if node is None:
            return controller
        # The file says the number inside the cluster; the kernel tells both.
        file = self.folder / f"{node}.pid"
        inside = file.read_text().strip() if file.exists() else None
        for pid in _descendants(controller):
            # This machine's number, the cluster's, the node's: PID 1 of a node.
            if _numbers(pid)[1:] == [inside, "1"]:
                return pid
        raise ProcessLookupError(f"node {node} is off")


def _descendants(pid: int) -> list[int]:
    found = []
    # A process may end while it is looked at.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _numbers(pid: int) -> list[str]:
    """A process's number in each of the namespaces that it is in, outermost first."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if match := re.search(r"^NSpid:\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return match.group(1).split()
    return []


def _remove_cgroup(path: Path, timeout: float = 20) -> None:
    """Remove a subtree of the freezer; the kernel may still be burying its processes."""
    end = time.monotonic() + timeout
    while path.exists():
        try:
            for folder in [*sorted((each for each in path.rglob("*") if each.is_dir()), reverse=True), path]:
                folder.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
