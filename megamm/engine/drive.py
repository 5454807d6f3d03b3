"""Optimizer state on a drive (`zero3_nvme`): what must be there before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError
from megamm.engine.distributed import import_deepspeed


def check_drive(ds_config: dict[str, Any]) -> None:
    """Refuse a drive that is not there, and a machine on which DeepSpeed cannot read and write it. Settings without one pass.

    Compiles DeepSpeed's `async_io` where it was not installed with it, into `$TORCH_EXTENSIONS_DIR`.

    Raises:
        ConfigError: The folder is missing, or `async_io` cannot be had.
    """
    offload = ds_config["zero_optimization"].get("offload_optimizer", {})
    if offload.get("device") != "nvme":
        return
    path = Path(str(offload.get("nvme_path")))
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; set zero_optimization.offload_optimizer.nvme_path in engine.overrides to one on a drive")
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
