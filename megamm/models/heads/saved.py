"""A head's weights and settings as files of their own beside the core: a folder loads without them, and with them answers as trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamm.config import Head
from megamm.core.errors import CheckpointError
from megamm.core.files import write_json
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.head import BackboneHead

WEIGHTS, SETTINGS = "head.safetensors", "head.json"
PREFIX = "head."
"""What the names of a head's weights begin with in the whole model."""


def save_head(head: BackboneHead, folder: Path) -> None:
    """Write a head's weights, in their own type, and its settings into a folder."""
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / SETTINGS, dataclasses.asdict(head.settings))


def read_head(folder: Path, config: MegaMMConfig, dtype: torch.dtype | None) -> BackboneHead | None:
    """The head that `save_head` wrote, in evaluation mode; None where the folder has none.

    Args:
        folder: An exported folder.
        config: Of the model beside it.
        dtype: Type of the weights; None keeps that of the file.

    Raises:
        CheckpointError: A file is missing or damaged, or they are of different heads.
        ConfigError: The head does not go with the model.
    """
    if not (folder / SETTINGS).is_file() and not (folder / WEIGHTS).is_file():
        return None
    try:
        settings = TypeAdapter(Head).validate_json((folder / SETTINGS).read_bytes(), strict=True)
        state = load_file(folder / WEIGHTS)
    except (OSError, ValidationError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no whole head ({' '.join(str(error).split())[:200]}); export the run again") from None
    return filled_head(settings, config, state, dtype=dtype, where=folder)


def filled_head(
    settings: Head, config: MegaMMConfig, state: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None, where: Path
) -> BackboneHead:
    """A head with these weights, in evaluation mode.

    Args:
        settings: Of the recipe that trained it.
        config: Of its model.
        state: Names inside the head -> values.
        dtype: Type of the weights; None keeps theirs.
        where: Where they come from, for the error.

    Raises:
        CheckpointError: The weights are of another head.
        ConfigError: The head does not go with the model.
    """
    head = BackboneHead(settings, config)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != found:
        name = next(iter(sorted(dict(shapes.items() ^ found.items()))))
        raise CheckpointError(f"{where}: {name} of the head has the shape {found.get(name)}, not {shapes.get(name)}; use its own settings")
    head.to(dtype or next(iter(state.values())).dtype)
    head.load_state_dict(dict(state))
    return head.eval()
