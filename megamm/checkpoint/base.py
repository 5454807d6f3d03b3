"""The weights that a run starts from, known by a digest: a checkpoint of another run, or an exported folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megamm.core.errors import CheckpointError
from megamm.core.files import canonical_json, digest_text

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Base:
    """Where weights lie, and which they are.

    Attributes:
        path: A checkpoint folder or an exported folder, absolute.
        digest: Of the manifest of a checkpoint, which names the digests of all its files; of the weight files of an exported folder.
        step: Optimizer steps that the checkpoint holds; None for an exported folder.
    """

    path: str
    digest: str
    step: int | None = None


def tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name of an exported folder whose index says so; empty where one file holds all.

    Raises:
        CheckpointError: There are no safetensors, or the index is damaged.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}); export the run again") from None
    if not (folder / _SINGLE).is_file():
        raise CheckpointError(f"{folder} holds neither a checkpoint nor {_SINGLE}; name a run, a checkpoint or an exported folder")
    return {}


def weight_files(folder: Path) -> list[str]:
    """Names of an exported folder's weight files.

    Raises:
        CheckpointError: As `tensor_files`.
    """
    return sorted(set(tensor_files(folder).values())) or [_SINGLE]


def folder_digest(digests: dict[str, str]) -> str:
    """Digest of an exported folder, from those of its weight files."""
    return digest_text(canonical_json(digests))
