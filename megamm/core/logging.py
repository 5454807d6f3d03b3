"""Log lines with the rank in front, on standard error so that standard output stays data."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megamm.core.env import RankInfo


def get_logger(name: str) -> logging.Logger:
    """Logger below `megamm`; `setup` decides where its lines go."""
    return logging.getLogger(f"megamm.{name}")


def setup(info: RankInfo, *, folder: Path | None = None, level: int = logging.INFO) -> None:
    """Send warnings of every rank and all lines of rank 0 to standard error, and every line to a file a rank.

    Args:
        info: This process's ranks.
        folder: Where `rank_00000.log` is appended; None for no files.
        level: Lowest level on rank 0 and in the files.
    """
    root = logging.getLogger("megamm")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    root.propagate = False
    form = logging.Formatter(f"%(asctime)s [rank {info.rank}] %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(level if info.rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [stream]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / f"rank_{info.rank:05d}.log"))
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
