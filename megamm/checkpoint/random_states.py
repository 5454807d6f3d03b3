"""The random states of one rank as plain tensors: torch's on CPU and device, NumPy's and Python's."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

PREFIX = "random/"


def capture(device: torch.device) -> dict[str, torch.Tensor]:
    """Read all generators of this process; drawing goes on undisturbed."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, words, python_gauss = random.getstate()
    states = {
        "torch_cpu": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "gauss": torch.tensor([gauss, math.nan if python_gauss is None else python_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["torch_cuda"] = torch.cuda.get_rng_state(device)
    return {PREFIX + name: state for name, state in states.items()}


def restore(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `capture` read. A device that the states do not know keeps its own."""
    torch.set_rng_state(states[f"{PREFIX}torch_cpu"])
    numpy_gauss, python_gauss = states[f"{PREFIX}gauss"].tolist()
    *keys, position, has_gauss = states[f"{PREFIX}numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, numpy_gauss))
    version, *words = states[f"{PREFIX}python"].tolist()
    random.setstate((version, tuple(words), None if math.isnan(python_gauss) else python_gauss))
    if device.type == "cuda" and f"{PREFIX}torch_cuda" in states:
        torch.cuda.set_rng_state(states[f"{PREFIX}torch_cuda"], device)
