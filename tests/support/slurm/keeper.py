"""Keeps a test cluster for as long as its owner lives: `python keeper.py FOLDER COMMAND ...`.

Standard input is a pipe that the owner alone holds open. However the owner ends, killed included, the pipe closes, and then every
process that came of COMMAND is ended and the cluster's folder and cgroup are removed. Where COMMAND ends first, `FOLDER/dead` says so
and the files stay until the owner has read them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_SECONDS = 0.1


def main() -> None:
    """Start the command, wait, clean up."""
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    # Daemons that leave their parents come to this process, not to the machine's init, where nobody would know them as ours.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    freezer = folder / "freezer"
    if freezer.is_symlink():
        freezer.readlink().mkdir()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL).pid
    (folder / "pid").write_text(f"{child}\n")
    is_held = True
    while is_held and child not in _bury():
        is_held = not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]
    _end_all(folder)
    (folder / "dead").touch()
    while is_held:
        is_held = bool(sys.stdin.buffer.read(1))
    if freezer.is_symlink():
        _remove_cgroup(freezer.readlink())
    shutil.rmtree(folder, ignore_errors=True)


def _bury() -> list[int]:
    """Children that ended: Slurm takes one that nobody waited for as still running."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.append(pid)
    return ended


def _end_all(folder: Path) -> None:
    """Until none is left, because one that is looked up may start another before it is killed."""
    while processes := [*psutil.Process().children(recursive=True), *_strangers(folder)]:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _bury()
        time.sleep(0.01)


def _strangers(folder: Path) -> Iterator[psutil.Process]:
    """What the owner started and did not end: its commands, and a controller that it started again."""
    mark = str(folder / "slurm.conf")
    for process in psutil.process_iter():
        # Gone by now, dead but not buried, or somebody else's.
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == mark and process.pid != os.getpid():
                yield process


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


if __name__ == "__main__":
    main()
