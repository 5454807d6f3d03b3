"""Optimizer state on a drive (`zero3_nvme`): what must be there before a run begins, and a folder that is one process's own."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError
from megamm.engine.distributed import import_deepspeed

_PREFIX = "megamm-"


class OwnFolder:
    """A folder on a drive that is this process's alone.

    DeepSpeed names its files after rank and parameter, so two runs that share a node and its drive would read each other's moments.

    State: the folder, and a lock on it that the kernel lets go when this process ends, however that is. What a process left that
    was killed goes when the next one takes a folder beside it.
    """

    def __init__(self, drive: Path):
        """Take a new folder on `drive`.

        Raises:
            ConfigError: The drive cannot be written to, or knows no locks.
        """
        try:
            for left in drive.glob(f"{_PREFIX}*"):
                _remove_if_left(left)
            self.path, self._descriptor = _new_folder(drive)
        except OSError as error:
            raise ConfigError(
                f"{drive} cannot hold optimizer state ({error}); set zero_optimization.offload_optimizer.nvme_path in engine.overrides to "
                "a folder on a drive of the node's own"
            ) from error

    def close(self) -> None:
        """Delete the folder with what it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def open_drive(ds_config: dict[str, Any]) -> tuple[dict[str, Any], OwnFolder | None]:
    """Check what a drive needs and take a folder on it. Settings without a drive pass as they are.

    Compiles DeepSpeed's `async_io` where it was not installed with it, into `$TORCH_EXTENSIONS_DIR`.

    Returns:
        The settings with the folder as their `nvme_path`, and the folder, to be closed after the engine.

    Raises:
        ConfigError: The drive is missing or refuses, or `async_io` cannot be had.
    """
    zero = ds_config["zero_optimization"]
    offload = zero.get("offload_optimizer", {})
    if offload.get("device") != "nvme":
        return ds_config, None
    drive = Path(str(offload.get("nvme_path")))
    if not drive.is_dir():
        raise ConfigError(f"{drive} is no folder; set zero_optimization.offload_optimizer.nvme_path in engine.overrides to one on a drive")
    load_async_io()
    folder = OwnFolder(drive)
    return ds_config | {"zero_optimization": zero | {"offload_optimizer": offload | {"nvme_path": str(folder.path)}}}, folder


def load_async_io() -> None:
    """Load what DeepSpeed reads and writes drives with; compiles it first where nobody did.

    Raises:
        ConfigError: This machine can neither load nor compile it.
    """
    import_deepspeed()
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    # Asked first: loading compiles other things for a minute before it finds that libaio is not there.
    if not installed_ops.get(builder.NAME) and not builder.is_compatible(verbose=False):
        raise _refusal("libaio's headers or a compiler are missing")
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise _refusal(str(error).splitlines()[0]) from error


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"offload_optimizer.device='nvme' needs DeepSpeed's async_io, which cannot be had here ({reason}); install libaio-dev and a "
        "compiler, or use the preset zero3_offload"
    )


def _new_folder(drive: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=drive))
        # Another process may have taken it for one that was left, in the moment before it is locked.
        if (descriptor := _lock(path)) is not None:
            return path, descriptor


def _remove_if_left(path: Path) -> None:
    try:
        descriptor = _lock(path)
    except PermissionError:
        return
    if descriptor is not None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """A descriptor that locks a folder; None where another process holds it, or deleted it meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
