"""What a test cluster needs of the machine, and how it gets there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_DAEMONS = ("slurmctld", "slurmd", "sbatch", "munged")
_PROGRAMS = (*_DAEMONS, "ip", "unshare", "nsenter", "pgrep")
_PACKAGES = ("slurm-wlm", "munge", "iproute2", "procps")
_PROBE = """mount --make-rprivate /; mount -t tmpfs probe /mnt; hostname probe
ip link add switch type bridge; ip link add cable type veth peer name plug"""


def missing() -> str | None:
    """Why no cluster with nodes of their own can run here, in one line; None where it can."""
    if os.geteuid():
        return "a test cluster needs root (namespaces, a bridge)"
    if reason := _not_installed(_PROGRAMS):
        return reason
    words = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc", "sh", "-ec", _PROBE]
    probe = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"this kernel gives no namespaces, mounts or bridges: {probe.stderr.strip()}" if probe.returncode else None


def missing_for_ports() -> str | None:
    """Why not even a cluster on ports can run here, in one line; None where it can."""
    return _not_installed(_DAEMONS)


def install(programs: tuple[str, ...] = _PROGRAMS, names: tuple[str, ...] = _PACKAGES) -> None:
    """Install packages (Slurm's) where root and apt are at hand; what is missing afterwards is for `missing` to say."""
    if not all(map(shutil.which, programs)):
        install_packages(names)


def install_packages(names: tuple[str, ...]) -> None:
    """Install Debian packages where root and apt are at hand."""
    if os.geteuid() or shutil.which("apt-get") is None:
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # No daemon of the system's own may start along with the packages.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *names]):
            subprocess.run(["apt-get", *words], env=quiet, stdout=subprocess.DEVNULL, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if made:
            policy.unlink()


def _not_installed(programs: tuple[str, ...]) -> str | None:
    absent = [program for program in programs if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed: apt-get install {' '.join(_PACKAGES)}" if absent else None
