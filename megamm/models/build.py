"""From a recipe to the composed model's configuration, its size and its parameter groups."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from megamm.config.schema import Adapter, Head, ImageFeatures, Model, Optimizer, Tower
from megamm.core.errors import ConfigError
from megamm.core.lengths import AUDIO_CHUNK_FRAMES
from megamm.core.names import did_you_mean
from megamm.models.adapters import is_adapter
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.head import BackboneHead
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.models.parts import FrozenBatchNorm2d

_PATCH_TOWER = "siglip2_vision_model"
_TOWERS_WITH_HEAD = (_PATCH_TOWER, "siglip_vision_model")
_AUDIO_TOWER = "qwen3_asr_encoder"
# Older names that every text configuration translates.
_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_NO_ADAPTER = Adapter()
_ADAPTER_KEYS = ("method", "targets", "rank", "alpha", "dropout", "prefix_tokens", "bottleneck_size")
_PARTS = ("language_model", "vision_tower", "vision_projector", "audio_tower", "multi_modal_projector")


def config_from_recipe(
    model: Model,
    *,
    vocab_size: int,
    control_ids: dict[str, int],
    adapter: Adapter = _NO_ADAPTER,
) -> MegaMMConfig:
    """Configuration of the model that a recipe describes.

    Args:
        model: The recipe's model.
        adapter: The recipe's adapter.
        vocab_size: Size of the whole id space, a multiple of 128; final, embeddings are never resized.
        control_ids: Name of a control token (`pad`, `bos`, `image`, ...) to its id.

    Raises:
        ConfigError: A tower that is not known or does not fit, keys that its configuration does not have, features
            that contradict it, or an adapter that does not fit.
    """
    text = _text_config(model.text, vocab_size)
    config = MegaMMConfig(
        text_config=text,
        vision_config=None if model.vision is None else _vision_config(model.vision, model.image_features),
        audio_config=None if model.audio is None else _audio_config(model, text.hidden_size),
        image_features=_plain(model.image_features),
        audio_features=_plain(model.audio_features),
        image_token_id=control_ids["image"],
        audio_token_id=control_ids["audio"],
        image_start_token_id=control_ids["image_start"],
        image_end_token_id=control_ids["image_end"],
        audio_start_token_id=control_ids["audio_start"],
        audio_end_token_id=control_ids["audio_end"],
        end_token_id=control_ids["end"],
        pad_token_id=control_ids["pad"],
        bos_token_id=control_ids["bos"],
        eos_token_id=[control_ids["end"], control_ids["eos"]],
    )
    if adapter.method != "none":
        config.adapter = {key: value for key, value in _plain(adapter).items() if key in _ADAPTER_KEYS}
        if adapter.method == "adalora":
            config.adapter["rank"] = adapter.budget.initial_rank
        try:
            num_parameters(config)
        except ValueError as error:
            raise ConfigError(f"adapter: {error}") from None
    return config


def build_model(config: MegaMMConfig, head: Head | None) -> MegaMMForConditionalGeneration:
    """The composed model, with the head that answers in place of tokens where there is one.

    Raises:
        ConfigError: The head does not go with the model.
    """
    model = MegaMMForConditionalGeneration(config)
    if head is not None:
        model.head = BackboneHead(head, config)
    return model


def num_parameters(config: MegaMMConfig) -> dict[str, int]:
    """Parameters of the whole model (`total`, tied weights once), of each part, and of an adapter in them, without allocating them."""
    with torch.device("meta"):
        model = MegaMMForConditionalGeneration(config)
    counts = {"total": sum(parameter.numel() for parameter in model.parameters())}
    for name in _PARTS:
        part = getattr(model.model, name)
        if part is not None:
            counts[name] = sum(parameter.numel() for parameter in part.parameters())
    counts["lm_head"] = counts["total"] - sum(counts[name] for name in _PARTS if name in counts)
    if config.adapter is not None:
        counts["adapter"] = sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name))
    return counts


def parameter_groups(
    model: MegaMMForConditionalGeneration,
    recipe: Model,
    optim: Optimizer,
    adapter: Adapter = _NO_ADAPTER,
) -> list[dict[str, Any]]:
    """Freeze what the recipe freezes and group what is left for the optimizer.

    Adapters and a head train, and the model's own weights beside adapters only where the recipe says so. Each tower has its own
    learning rate, its adapters included; norms, biases and embeddings of positions are not decayed. Groups come in a fixed order and
    empty ones are left out, the same on all ranks.

    Args:
        model: The composed model, whole or partitioned by ZeRO-3.
        recipe: Which towers train, and their `lr_scale`.
        optim: Peak learning rate and weight decay.
        adapter: The recipe's adapter.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`.

    Raises:
        ConfigError: Nothing is left to train.
    """
    towers = {"text": recipe.text, "vision": recipe.vision, "audio": recipe.audio}
    parts = towers | {"head": recipe.head}
    scales = {name: part.lr_scale for name, part in parts.items() if part is not None} | {"projector": recipe.projector_lr_scale}
    frozen = {id(one) for module in model.modules() if isinstance(module, FrozenBatchNorm2d) for one in module.parameters()}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {(owner, decays): [] for owner in scales for decays in (True, False)}
    for name, parameter in model.named_parameters():
        owner = owner_of(name)
        tower = towers.get(owner)
        is_base_trained = id(parameter) not in frozen and (tower is None or tower.trainable) and not adapter.freezes_base
        parameter.requires_grad_(is_adapter(name) or owner == "head" or is_base_trained)
        if parameter.requires_grad:
            members[owner, _decays(name, parameter)].append(parameter)
    groups = [
        {
            "name": owner if decays else f"{owner}_no_decay",
            "params": parameters,
            "lr": optim.lr * scales[owner],
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (owner, decays), parameters in members.items()
        if parameters
    ]
    if not groups:
        raise ConfigError("every tower is frozen and there is no projector; set model.text.trainable=true")
    return groups


def owner_of(name: str) -> str:
    """Which part of the model a parameter or buffer belongs to, adapters included: `text`, `vision`, `audio`, `projector` or `head`."""
    if name.startswith("head."):
        return "head"
    if name.startswith("model.vision_tower."):
        return "vision"
    if name.startswith("model.audio_tower."):
        return "audio"
    if name.startswith(("model.vision_projector.", "model.multi_modal_projector.")):
        return "projector"
    return "text"


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # A parameter that ZeRO-3 partitioned has the shape (0,) and keeps its real one here.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and "position_embedding" not in name


def _text_config(tower: Tower, vocab_size: int) -> PreTrainedConfig:
    values = dict(tower.config)
    if values.pop("vocab_size", vocab_size) != vocab_size:
        raise ConfigError(
            f"model.text.config.vocab_size={tower.config['vocab_size']} is not the vocabulary's {vocab_size}; "
            "leave it out, the tokenizer sets it"
        )
    config = _tower_config("text", tower, values)
    for name in ("attention_dropout", "sliding_window"):
        if getattr(config, name, None):
            raise ConfigError(f"model.text.config.{name}={getattr(config, name)} does not go with packed rows; leave it out")
    config.vocab_size = vocab_size
    # An embedding with a padding index would keep that row without gradient; padding is never supervised anyway.
    config.pad_token_id = None
    return config


def _vision_config(tower: Tower, features: ImageFeatures) -> PreTrainedConfig:
    if (tower.type == _PATCH_TOWER) != (features.kind == "naflex"):
        raise ConfigError(
            f"model.vision.type={tower.type!r} does not take model.image_features.kind={features.kind!r}; "
            f"use 'naflex' with {_PATCH_TOWER!r} and 'fixed' with every other tower"
        )
    values = dict(tower.config)
    if values.pop("vision_use_head", False):
        raise ConfigError("model.vision.config.vision_use_head=true adds a pooling head that no token reads; set it to false")
    config = _tower_config("vision", tower, values)
    if tower.type in _TOWERS_WITH_HEAD:
        # An attribute that transformers reads in all versions and lists as a field only in newer ones.
        config.vision_use_head = False
    if features.kind == "fixed":
        _check_fixed_tower(config, features)
        return config
    if dropout := getattr(config, "attention_dropout", 0):
        raise ConfigError(f"model.vision.config.attention_dropout={dropout} does not go with packed rows of pictures; leave it out")
    if config.patch_size != features.patch_size:
        raise ConfigError(
            f"model.image_features.patch_size={features.patch_size} is not the vision tower's {config.patch_size}; "
            f"set it to {config.patch_size}"
        )
    if features.merge**2 > features.max_patches:
        raise ConfigError(
            f"model.image_features.max_patches={features.max_patches} is less than one merged token of {features.merge}x{features.merge} "
            f"patches; set it to {features.merge**2} or more"
        )
    return config


def _check_fixed_tower(config: PreTrainedConfig, features: ImageFeatures) -> None:
    """Run the tower without data: its map must have the promised stride, and every parameter must reach the map."""
    step = features.stride * features.merge
    if features.size % step:
        raise ConfigError(
            f"model.image_features.size={features.size} is not a multiple of stride {features.stride} x merge {features.merge}; "
            f"set it to {max(1, features.size // step) * step}"
        )
    with torch.device("meta"):
        tower = AutoModel.from_config(config)
        hidden = tower(pixel_values=torch.zeros(1, 3, features.size, features.size)).last_hidden_state
    cells = features.size // features.stride
    shape = tuple(hidden.shape[2:]) if hidden.dim() == 4 else (hidden.shape[1],)
    if shape not in ((cells, cells), (cells * cells,)):
        raise ConfigError(
            f"the vision tower {config.model_type!r} returns a map of {'x'.join(map(str, shape))} for {features.size} pixels, not "
            f"{cells}x{cells} (model.image_features.stride={features.stride}); "
            "set the stride that it has, or take a tower without extra tokens"
        )
    hidden.sum().backward()
    unused = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    if unused:
        raise ConfigError(
            f"the vision tower {config.model_type!r} has {len(unused)} parameters that its feature map does not use ({unused[0]} first), "
            "which ZeRO-3 cannot train; take a tower without a pooling head"
        )


def _audio_config(model: Model, text_hidden_size: int) -> PreTrainedConfig:
    tower, features = model.audio, model.audio_features
    if tower.type != _AUDIO_TOWER:
        raise ConfigError(f"model.audio.type={tower.type!r} does not take sounds of any length; use {_AUDIO_TOWER!r}")
    values = dict(tower.config)
    if values.setdefault("output_dim", text_hidden_size) != text_hidden_size:
        raise ConfigError(
            f"model.audio.config.output_dim={values['output_dim']} is not the decoder's hidden_size {text_hidden_size}; leave it out"
        )
    values.setdefault("num_mel_bins", features.num_mel)
    config = _tower_config("audio", tower, values)
    config.output_dim = text_hidden_size
    if config.num_mel_bins != features.num_mel:
        raise ConfigError(
            f"model.audio_features.num_mel={features.num_mel} is not the audio tower's num_mel_bins={config.num_mel_bins}; "
            f"set it to {config.num_mel_bins}"
        )
    if 2 * config.n_window != AUDIO_CHUNK_FRAMES:
        raise ConfigError(f"model.audio.config.n_window={config.n_window} is not {AUDIO_CHUNK_FRAMES // 2}; leave it out")
    if features.rate_hz < 16000:
        raise ConfigError(f"model.audio_features.rate_hz={features.rate_hz} holds no 8 kHz, where the mel bands end; set 16000")
    return config


def _tower_config(name: str, tower: Tower, values: dict[str, Any]) -> PreTrainedConfig:
    if tower.pretrained:
        return _pretrained_config(name, tower)
    try:
        kind = type(AutoConfig.for_model(tower.type))
    except ValueError:
        raise ConfigError(f"model.{name}.type={tower.type!r} is not a model_type that transformers knows") from None
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map) | set(_ROPE_KEYS)
    for key in values:
        if key not in known:
            raise ConfigError(f"model.{name}.config.{key} is not a key of {kind.__name__}{did_you_mean(key, known)}")
    try:
        return kind(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"model.{name}.config is not valid for {kind.__name__}: {' '.join(str(error).split())}; correct it") from None


def _pretrained_config(name: str, tower: Tower) -> PreTrainedConfig:
    """The tower's configuration from its own folder, or from the folder of a model that contains it."""
    folder = Path(tower.pretrained)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.{name}.pretrained={tower.pretrained!r} has no config.json; name a local Hugging Face folder")
    config = AutoConfig.from_pretrained(folder)
    candidates = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    for one in candidates:
        if one is not None and one.model_type == tower.type:
            return one
    found = ", ".join(sorted({one.model_type for one in candidates if one is not None}))
    raise ConfigError(
        f"model.{name}.pretrained={tower.pretrained!r} holds {found}, not {tower.type!r}; set model.{name}.type to what it holds"
    )


def _plain(features: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(features).items()}
