"""A Slurm cluster without privileges: every node is a daemon of this machine on a port of its own.

Nodes share the machine's name, address and processes, so there is no power to cut and no cable to pull; jobs, steps, requeues,
preemption and time limits are as real as elsewhere.
"""

from __future__ import annotations

import os
import platform
import pwd
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.support.slurm.commands import HERE, Commands, checked
from tests.support.slurm.settings import new_tag, write_settings


class PortsCluster(Commands):
    """A running cluster of an ordinary user's; a context manager.

    Args:
        num_nodes: Daemons.
        gpus_per_node: Fake GPUs.
        cpus_per_node: Processors that Slurm may give away.
        user: Whose it is; None for whoever runs this. Only root can name another.
    """

    def __init__(self, num_nodes: int = 2, *, gpus_per_node: int = 2, cpus_per_node: int = 4, user: str | None = None):
        self.tag = new_tag()
        self.nodes = tuple(f"{self.tag}{number}" for number in range(1, num_nodes + 1))
        self._gpus, self._cpus = gpus_per_node, cpus_per_node
        self._user = pwd.getpwnam(user) if user else pwd.getpwuid(os.geteuid())
        self._is_other = self._user.pw_uid != os.geteuid()

    def _start_command(self) -> list[str]:
        self.folder = folder = Path(tempfile.mkdtemp(prefix=f"slurm-{self.tag}-", dir="/tmp"))
        host = platform.node()
        controller, *ports = _free_ports(len(self.nodes) + 1)
        write_settings(
            folder,
            tag=self.tag,
            user=self._user.pw_name,
            controller=f"{host}(127.0.0.1)",
            nodes=[f"{node} NodeAddr=127.0.0.1 NodeHostname={host} Port={port}" for node, port in zip(self.nodes, ports, strict=True)],
            cpus_per_node=self._cpus,
            gpus_per_node=self._gpus,
            more=[f"SlurmctldPort={controller}"],
        )
        command = ["bash", str(HERE / "ports.sh"), str(folder), *self.nodes]
        if not self._is_other:
            return command
        for path in (folder, *folder.iterdir()):
            os.chown(path, self._user.pw_uid, self._user.pw_gid, follow_symlinks=False)
        return ["setpriv", f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups", "--", *command]

    def run(self, *command: str, check: bool = True, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as the cluster's user.

        Raises:
            RuntimeError: It failed, and `check` was asked for; holds what it printed.
        """
        environment = self.environment(options.pop("env", {}))
        if self._is_other:
            options |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False, **{"cwd": self.folder, **options}
        )
        return checked(result, check=check)


def _free_ports(num: int) -> list[int]:
    """TCP ports that nobody listened on a moment ago, each another."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
