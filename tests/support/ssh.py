"""A real sshd on each node of a test cluster, with keys of its own, so that launchers that reach nodes over ssh can be tried."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.support.slurm import packages
from tests.support.slurm.cluster import Cluster

_SSHD = "/usr/sbin/sshd"
_PROGRAMS = (_SSHD, "ssh", "ssh-keygen", "pdsh")
_PACKAGES = ("openssh-server", "openssh-client", "pdsh")
_SERVER = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""
_CLIENT = """\
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def install() -> None:
    """Install ssh and pdsh where root and apt are at hand; what is missing afterwards is for `missing` to say."""
    packages.install(_PROGRAMS, _PACKAGES)


def missing() -> str | None:
    """Why nodes cannot be reached over ssh here, in one line; None where they can."""
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed: apt-get install {' '.join(_PACKAGES)}" if absent else None


def serve(cluster: Cluster, folder: Path) -> None:
    """Start sshd on every node; root of one node may log in to each of them without a password. They end with the cluster.

    Args:
        cluster: A running one.
        folder: Empty; for keys and settings.
    """
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "ssh_config").write_text(_CLIENT.format(folder=folder))
    for node in cluster.nodes:
        settings = folder / "sshd_config"
        settings.write_text(_SERVER.format(folder=folder))
        # The node's own /etc and /run: nothing of it is seen outside.
        cluster.run("mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config", node=node)
        cluster.run("mount", "-t", "tmpfs", "run", "/run", node=node)
        cluster.run("mkdir", "-m", "755", "/run/sshd", node=node)
        cluster.run(_SSHD, "-f", str(settings), node=node)
