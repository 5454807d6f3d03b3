"""Pretrained towers: weights of local Hugging Face folders under the names of the composed model, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModel, PreTrainedConfig

from megamm.config.schema import Model
from megamm.core.errors import ConfigError
from megamm.models.configuration_megamm import MegaMMConfig

_PLACES = {"text": "model.language_model.", "vision": "model.vision_tower.", "audio": "model.audio_tower."}
# What a tower's names begin with in folders of the tower alone, of a model with a head, and of composed models.
_PREFIXES = {
    "text": ("model.language_model.", "language_model.model.", "language_model.", "model."),
    "vision": ("model.vision_tower.", "vision_tower.", "vision_model.", "model.", "resnet."),
    "audio": ("model.audio_tower.", "audio_tower.", "model."),
}
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"


def pretrained_folders(model: Model) -> dict[str, Path]:
    """Tower (`text`, `vision`, `audio`) -> the folder that it starts from, of those that the recipe's model names one for."""
    towers = {"text": model.text, "vision": model.vision, "audio": model.audio}
    return {name: Path(tower.pretrained) for name, tower in towers.items() if tower is not None and tower.pretrained}


def pretrained_weights(model: Model, config: MegaMMConfig, towers: Collection[str] = tuple(_PLACES)) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of pretrained towers, in the folders' own types, reading one tensor at a time.

    The folder's ids come first in the vocabulary. Rows of the token embedding and of an untied head behind them start as
    the mean of the folder's, so that a token that was never seen begins with ordinary logits.

    Args:
        model: The recipe's model: which towers start from which folders.
        config: What `config_from_recipe` made of it.
        towers: Those that are wanted, of the ones that start from folders.

    Yields:
        Name of a parameter or buffer of `MegaMMForConditionalGeneration`, and its value.

    Raises:
        ConfigError: A folder without safetensors, or one that lacks a tensor of the tower or holds it in another shape.
    """
    for name, folder in pretrained_folders(model).items():
        if name in towers:
            yield from _tower_weights(name, folder, getattr(config, f"{name}_config"))


def _tower_weights(name: str, folder: Path, config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in AutoModel.from_config(config).state_dict().items()}
    files = _files(name, folder)
    found = {own: key for key in files if (own := _own_name(name, key, shapes)) is not None}
    if missing := sorted(set(shapes) - set(found)):
        raise ConfigError(
            f"model.{name}.pretrained={str(folder)!r} lacks {len(missing)} of {len(shapes)} weights of {config.model_type!r} "
            f"({missing[0]} first); name a folder of that architecture"
        )
    for own, key in found.items():
        yield _PLACES[name] + own, _checked(name, own, _read(folder / files[key], key), shapes[own])
    if name == "text" and not config.tie_word_embeddings:
        # A folder whose head is tied to its embedding starts our untied head from the embedding.
        key = _HEAD if _HEAD in files else found[_EMBEDDING]
        yield _HEAD, _checked(name, _HEAD, _read(folder / files[key], key), shapes[_EMBEDDING])


def _own_name(name: str, key: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The tower's own name of a folder's `key`, or None for what is not the tower's (heads, other towers)."""
    candidates = [key, *(key.removeprefix(prefix) for prefix in _PREFIXES[name] if key.startswith(prefix))]
    return next((one for one in candidates if one in shapes), None)


def _files(name: str, folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the index of a sharded folder or from its single file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    raise ConfigError(f"model.{name}.pretrained={str(folder)!r} has no model.safetensors; convert it with save_pretrained")


def _read(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def _checked(name: str, own: str, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if own in (_EMBEDDING, _HEAD) and value.shape[1:] == shape[1:]:
        # Folders pad their vocabulary: it may be longer than ours as well.
        num_new = max(0, shape[0] - value.shape[0])
        mean = value.mean(0, keepdim=True, dtype=torch.float32).to(value.dtype)
        value = torch.cat([value[: shape[0]], mean.expand(num_new, -1)])
    if tuple(value.shape) != shape:
        raise ConfigError(
            f"model.{name}.pretrained: {own} has the shape {list(value.shape)}, the model's is {list(shape)}; check config.json"
        )
    return value
