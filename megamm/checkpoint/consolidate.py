"""Whole tensors out of a checkpoint's slices, without DeepSpeed and without a process group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megamm.checkpoint.manifest import read_manifest
from megamm.checkpoint.slices import Slices


def consolidate(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter whole, in float32, in the model's order, then the persistent buffers as they are.

    One tensor is in memory at a time. Of tied parameters the first name is given. The files are taken as they are: call
    `manifest.verify` before, where nothing else did.

    Raises:
        CheckpointError: The manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    with Slices(folder, manifest) as slices:
        for entry in manifest.parameters:
            num_elements = math.prod(entry.shape)
            if entry.kind == "buffer":
                yield entry.name, slices.read(f"buffer/{entry.name}", 0, num_elements).reshape(entry.shape)
            else:
                yield entry.name, slices.read(f"weight/{entry.name}", 0, num_elements).reshape(entry.shape).float()
