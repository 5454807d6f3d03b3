"""A Slurm cluster of several nodes on one machine: real daemons, real jobs, fake GPUs.

Each node has its own host name, address, process space and shared memory, behind a bridge inside namespaces of the cluster. Nothing
of it is visible outside, several clusters run at once with the same addresses, and killing one process ends all of it. `ports` has
the form for those who are not root.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.support.slurm.commands import HERE, Commands, checked
from tests.support.slurm.settings import new_tag, write_settings

_FREEZER = Path("/sys/fs/cgroup/freezer")


class Cluster(Commands):
    """A running cluster of root's; a context manager.

    Attributes:
        tag: Its name; every node's name, folder and cgroup holds it.
        has_freezer: Whether job steps are tracked by the freezer, which no process escapes.
    """

    def __init__(self, num_nodes: int = 2, *, gpus_per_node: int = 2, cpus_per_node: int = 4):
        self.tag = new_tag()
        self.nodes = tuple(f"{self.tag}{number}" for number in range(1, num_nodes + 1))
        self.has_freezer = os.access(_FREEZER, os.W_OK) and (_FREEZER / "cgroup.procs").exists()
        self._gpus, self._cpus = gpus_per_node, cpus_per_node

    def _start_command(self) -> list[str]:
        # Short, because the path of a socket has 108 bytes at most.
        self.folder = folder = Path(tempfile.mkdtemp(prefix=f"slurm-{self.tag}-", dir="/tmp"))
        # slurmd takes host names from here as a user's programs do.
        addresses = {"controller": "10.77.0.1", **{node: f"10.77.0.{number}" for number, node in enumerate(self.nodes, start=2)}}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        if self.has_freezer:
            # The keeper makes it and takes it away.
            (folder / "freezer").symlink_to(_FREEZER / f"megamm-{self.tag}")
            (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n")
        write_settings(
            folder,
            tag=self.tag,
            user="root",
            controller="controller(10.77.0.1)",
            nodes=[f"{node} NodeAddr={addresses[node]}" for node in self.nodes],
            cpus_per_node=self._cpus,
            gpus_per_node=self._gpus,
            proctrack="proctrack/cgroup" if self.has_freezer else "proctrack/linuxproc",
        )
        words = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return [*words, "bash", str(HERE / "controller.sh"), str(folder), *self.nodes]

    def run(
        self, *command: str, node: str | None = None, check: bool = True, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller, or on a node.

        Raises:
            RuntimeError: It failed, and `check` was asked for; holds what it printed.
        """
        words = ["nsenter", "--target", str(self.pid(node)), "--mount", "--uts", "--ipc", "--net", "--pid", "--", *command]
        environment = self.environment(options.pop("env", {}))
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=False, **options)
        result.args = command
        return checked(result, check=check)

    def power_off(self, node: str) -> None:
        """Cut the power: every process of the node dies at once, and nothing is said to anybody."""
        os.kill(self.pid(node), signal.SIGKILL)
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

    def pid(self, node: str | None = None) -> int:
        """PID 1 of the controller or of a node, as this machine numbers it.

        Raises:
            ProcessLookupError: The node is off.
        """
        unshare = int((self.folder / "pid").read_text())
        controller = int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])
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
