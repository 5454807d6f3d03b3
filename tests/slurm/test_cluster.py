"""The test cluster itself: what the other tests of this folder take for granted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.slurm import packages
from tests.support.slurm.cluster import Cluster
from tests.support.slurm.commands import Commands
from tests.support.slurm.ports import PortsCluster

pytestmark = pytest.mark.slurm

CHECKOUT = Path(__file__).resolve().parents[2]
# The number of a task, its node, its GPUs, how many processes it sees.
WHO = 'srun bash -c \'echo "$SLURM_PROCID $SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES $(ls /proc | grep -c "^[0-9]")"\''
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
# Starts a cluster with a job, says so, and waits to be killed.
OWNER = """
import sys, time
from tests.support.slurm.cluster import Cluster
from tests.support.slurm.ports import PortsCluster
with {kind} as cluster:
    job = cluster.submit("--output=/dev/null", "--wrap", "srun sleep 1000")
    while not cluster.tasks(job, "sleep"):
        time.sleep(0.1)
    print(cluster.folder, cluster.tag, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def ports_cluster() -> Iterator[PortsCluster]:
    packages.install()
    if reason := packages.missing_for_ports():
        pytest.skip(reason)
    with PortsCluster(user=None if os.geteuid() else "nobody") as running:
        yield running


def test_every_task_sees_its_own_node_and_its_gpus(cluster: Cluster, tmp_path: Path):
    job = cluster.submit(*TWO_BY_TWO, f"--output={tmp_path}/out", "--wrap", WHO)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    lines = [line.split() for line in sorted((tmp_path / "out").read_text().splitlines())]
    assert [line[:4] for line in lines] == [[str(task), *[cluster.nodes[task // 2]] * 2, "0,1"] for task in range(4)]
    # A node's processes are its own: far fewer than this machine has.
    assert all(int(line[4]) < 40 for line in lines)


def test_nodes_reach_each_other_by_name_and_nothing_else(cluster: Cluster):
    first, second = cluster.nodes
    assert cluster.run("getent", "hosts", second, node=first).stdout.split()[0] == "10.77.0.3"
    interfaces = cluster.run("ls", "/sys/class/net", node=first).stdout
    addresses = cluster.run("ip", "-brief", "address", node=first).stdout
    assert "10.77.0.2/24" in addresses and "eth0" in addresses, interfaces


def test_a_cancelled_job_leaves_no_process(cluster: Cluster, tmp_path: Path):
    # Without a writable freezer Slurm loses sight of processes that leave their session.
    leave = "setsid nohup" if cluster.has_freezer else ""
    marker = tmp_path / "alive"
    loop = f"{leave} bash -c 'trap \"\" TERM; while sleep 0.1; do touch {marker}; done' & wait"
    job = cluster.submit("--output=/dev/null", "--wrap", loop)
    cluster.wait_for(job, "RUNNING")
    while not marker.exists():
        time.sleep(0.1)
    cluster.run("scancel", str(job))
    cluster.wait_for(job, "CANCELLED")
    cluster.wait_until_idle()
    marker.unlink()
    time.sleep(0.5)
    assert not marker.exists()


@pytest.mark.parametrize(("partition", "says_goodbye"), [("main", False), ("graceful", True)])
def test_an_urgent_job_sends_another_back_to_the_queue(cluster: Cluster, tmp_path: Path, partition: str, says_goodbye: bool):
    goodbye, ready = tmp_path / "goodbye", tmp_path / "ready"
    # Tasks hear of it in both partitions; with grace they may stay for longer than Slurm's KillWait.
    task = f'trap "sleep 12; touch {goodbye}; exit 1" TERM; touch {ready}; while true; do sleep 0.1; done'
    script = f"test $SLURM_RESTART_COUNT && exit 0\nsrun bash -c '{task}' & wait; wait; sleep 1000"
    cluster.run("scontrol", "update", "PartitionName=graceful", "GraceTime=30")
    job = cluster.submit("--nodes=2", f"--partition={partition}", "--output=/dev/null", "--wrap", script)
    while not ready.exists():
        time.sleep(0.1)
    urgent = cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap", "true")
    assert cluster.wait_for(urgent, "COMPLETED", "FAILED", timeout=120)["JobState"] == "COMPLETED"
    ended = cluster.wait_for(job, "COMPLETED", "FAILED", timeout=120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert goodbye.exists() == says_goodbye


def test_a_node_without_power_comes_back(can_run_slurm: None):
    with Cluster() as cluster:
        lost = cluster.nodes[1]
        cluster.power_off(lost)
        with pytest.raises(ProcessLookupError, match="is off"):
            cluster.run("true", node=lost)
        cluster.power_on(lost)
        cluster.wait_until_idle()
        assert sorted(cluster.run("srun", "--nodes=2", "hostname").stdout.split()) == sorted(cluster.nodes)


def test_the_controller_forgets_nothing_when_it_restarts(cluster: Cluster, tmp_path: Path):
    _outlives_a_restart(cluster, tmp_path / "out")


def test_a_cluster_of_an_ordinary_user(ports_cluster: PortsCluster):
    folder = ports_cluster.folder
    job = ports_cluster.submit(*TWO_BY_TWO, f"--output={folder}/who", "--wrap", f"id -u >{folder}/uid; {WHO}")
    assert ports_cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    lines = [line.split() for line in sorted((folder / "who").read_text().splitlines())]
    assert [[line[0], line[1], line[3]] for line in lines] == [[str(task), ports_cluster.nodes[task // 2], "0,1"] for task in range(4)]
    assert int((folder / "uid").read_text()) != 0
    _outlives_a_restart(ports_cluster, folder / "out")


def test_clusters_at_once_leave_nothing_behind(can_run_slurm: None):
    with Cluster(1) as one, Cluster(3) as other, PortsCluster(user="nobody") as third:
        for cluster in (one, other, third):
            answer = cluster.run("srun", f"--nodes={len(cluster.nodes)}", "printenv", "SLURMD_NODENAME").stdout
            assert sorted(answer.split()) == sorted(cluster.nodes)
        folders, namespaces = [cluster.folder for cluster in (one, other, third)], _namespaces(one.pid()) | _namespaces(other.pid())
        tags = [cluster.tag for cluster in (one, other, third)]
    for folder, tag in zip(folders, tags, strict=True):
        assert _left(folder, tag, namespaces) == []


@pytest.mark.parametrize("kind", ["Cluster()", 'PortsCluster(user="nobody")'])
def test_an_owner_that_is_killed_leaves_nothing_behind(can_run_slurm: None, kind: str):
    owner = subprocess.Popen([sys.executable, "-c", OWNER.format(kind=kind)], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    assert owner.stdout is not None
    folder, tag = owner.stdout.readline().split()
    inside = [process for process in psutil.process_iter() if _is_of(process, Path(folder))]
    namespaces = set().union(*(_namespaces(process.pid) for process in inside)) - _namespaces(os.getpid())
    assert len(inside) > 4 and len(namespaces) == (15 if kind == "Cluster()" else 0), "the cluster was not seen at all"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    end = time.monotonic() + 30
    while (left := _left(Path(folder), tag, namespaces)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def _outlives_a_restart(cluster: Commands, output: Path) -> None:
    job = cluster.submit(f"--output={output}", "--wrap", "srun bash -c 'echo begun; sleep 3; echo done'")
    # A step that is being created just then is held back for a minute: Slurm's own affair, not this test's.
    while not (output.exists() and "begun" in output.read_text()):
        time.sleep(0.1)
    cluster.restart_controller()
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert output.read_text() == "begun\ndone\n"


def _left(folder: Path, tag: str, namespaces: set[str]) -> list[str]:
    """What is left of a cluster: processes, namespaces, mounts, cgroups, network devices, files."""
    left = [f"process {process.pid}" for process in psutil.process_iter() if _is_of(process, folder)]
    left += [f"namespace {each}" for process in psutil.process_iter() for each in _namespaces(process.pid) & namespaces]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if tag in line or str(folder) in line]
    left += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"*megamm-{tag}*")]
    left += [str(path) for place in ("/tmp", "/dev/shm", "/run", "/var/spool", "/var/log") for path in Path(place).glob(f"*{tag}*")]
    # Devices of a cluster are named the same in each: only their being here at all would be wrong.
    return left + [str(path) for path in Path("/sys/class/net").iterdir() if path.name.startswith(("cable", "plug", "switch"))]


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get("SLURM_CONF") == str(folder / "slurm.conf")
    except psutil.Error:
        return False


def _namespaces(pid: int) -> set[str]:
    try:
        return {str(path.readlink()) for path in Path(f"/proc/{pid}/ns").iterdir() if path.name in ("mnt", "uts", "ipc", "net", "pid")}
    except OSError:
        return set()
