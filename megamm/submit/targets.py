"""Where runs can be submitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megamm.submit import slurm

TARGETS: dict[str, Callable[..., Iterator[str]]] = {"slurm": slurm.submit}
"""Name -> function of a request and `dry_run`, which yields lines for a person."""
