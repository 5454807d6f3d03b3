"""Real file systems for drills: a drill goes on in a mount namespace, in which anybody may mount a small disk.

Inside of the namespace runs `python -m benchmarks.drills.mounts MODULE FOLDER SIZE`, which calls the module's
`inside(folder, size) -> (problems, note)`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.drills.drill import Size, Tally

_ANSWER = "answer.json"
_NOT_ALLOWED = 77
# What unshare itself ends with where the kernel refuses.
_NO_NAMESPACE = 1
_ROOT = Path(__file__).resolve().parents[2]


def tally_inside(module: str, size: Size, folder: Path) -> Tally:
    """Run `module.inside` in a mount namespace and count what it finds.

    Returns:
        No tries where this machine or this user may not have such a namespace.

    Raises:
        RuntimeError: It ended without an answer.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return Tally(0, 0, 0, "not tried: no program unshare here")
    command = [unshare, "--map-root-user", "--mount", sys.executable, "-m", __name__, module, str(folder), size]
    ended = subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=False)
    answer = folder / _ANSWER
    if answer.is_file():
        return Tally.of(*json.loads(answer.read_text()))
    if ended.returncode in (_NO_NAMESPACE, _NOT_ALLOWED):
        return Tally(0, 0, 0, "not tried: namespaces or mounts are not allowed here")
    raise RuntimeError(f"the drill inside of the namespace ended with {ended.returncode}")


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of that size on a new folder; both go at the end.

    Raises:
        subprocess.CalledProcessError: It is not allowed.
    """
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(folder))
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        folder.rmdir()


def free_bytes(disk: Path) -> int:
    """What is left on a disk."""
    facts = os.statvfs(disk)
    return facts.f_bavail * facts.f_frsize


def mount(*arguments: str) -> None:
    """Run the program of that name.

    Raises:
        subprocess.CalledProcessError: It is not allowed.
    """
    subprocess.run(["mount", *arguments], check=True)


def _main(module: str, folder: Path, size: str) -> int:
    try:
        with small_disk(folder / "probe", 1 << 20):
            pass
    except (OSError, subprocess.CalledProcessError):
        return _NOT_ALLOWED
    (folder / _ANSWER).write_text(json.dumps(importlib.import_module(module).inside(folder, size)))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
