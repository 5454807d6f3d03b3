"""DeepSpeed's `async_io`, which reads and writes drives: compiled once, kept in pytest's cache folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.support.ranks import ROOT
from tests.support.slurm.packages import install_packages

_PACKAGES = ("libaio-dev", "g++")
_BUILD = "from megamm.engine.drive import load_async_io; load_async_io()"


def install() -> None:
    """Install what compiling it needs where root and apt are at hand; what is missing afterwards is for `missing` to say."""
    if missing():
        install_packages(_PACKAGES)


def missing() -> str | None:
    """Why it cannot be compiled here, in one line; None where it can."""
    folders = [Path("/usr/include"), *map(Path, filter(None, os.environ.get("CPATH", "").split(":")))]
    absent = [] if any((folder / "libaio.h").is_file() for folder in folders) else ["libaio's headers"]
    absent += [name for name in ("c++", "ninja") if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed: apt-get install {' '.join(_PACKAGES)}" if absent else None


def built(cache: Path) -> Path:
    """Where it lies once it is compiled."""
    return cache / "-".join(f"{name}-{version(name)}" for name in ("torch", "deepspeed"))


def build(cache: Path, timeout_seconds: float) -> Path:
    """A folder for `TORCH_EXTENSIONS_DIR` that holds it; minutes of compiling where `cache` has none of these versions yet.

    Compiled aside and renamed, because torch waits for ever for the lock of a build that was killed.
    """
    done = built(cache)
    if not done.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as name:
            draft = Path(name) / "extensions"
            environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(draft), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
            _run([sys.executable, "-c", _BUILD], environment, timeout_seconds)
            draft.rename(done)
    return done


def _run(words: list[str], environment: dict[str, str], timeout_seconds: float) -> None:
    """Wait for a program; on any error its compilers end with it."""
    child = subprocess.Popen(words, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = child.communicate(timeout=timeout_seconds)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise
    assert child.returncode == 0, output[-4000:]
