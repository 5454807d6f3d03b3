"""A machine that people log in to: it has no torch."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCKED = 'raise ImportError("there is no {0} on a login node")\n'


def login_node(folder: Path) -> dict[str, str]:
    """An environment in which torch, transformers and deepspeed cannot be imported; `folder` is made for it."""
    folder.mkdir()
    for name in ("torch", "transformers", "deepspeed"):
        (folder / f"{name}.py").write_text(_BLOCKED.format(name))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
