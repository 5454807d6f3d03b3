"""Stock views: parts of the composed model as classes of transformers that need no code of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import (
    AutoModelForCausalLM,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
)

from megamm.models.configuration_megamm import MegaMMConfig

_TEXT = "model.language_model."
_VISION_PROJECTOR = "model.vision_projector."
_AUDIO_PROJECTOR = "model.multi_modal_projector."
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class View:
    """One stock class that holds a part of the composed model.

    Attributes:
        is_possible: Whether the model has what the view needs.
        config: Configuration of the stock class.
        rename: Stock name of one of our parameters; None where the view leaves it out.
        build: Makes the stock model from its configuration.
    """

    is_possible: Callable[[MegaMMConfig], bool]
    config: Callable[[MegaMMConfig], PreTrainedConfig]
    rename: Callable[[str], str | None]
    build: Callable[[PreTrainedConfig], PreTrainedModel]


def _copy(config: PreTrainedConfig) -> dict:
    """A sub-configuration as plain values, without the attention that only the composed model uses."""
    return {key: value for key, value in config.to_dict().items() if not key.startswith("_")}


def _text_config(config: MegaMMConfig) -> PreTrainedConfig:
    ids = {"pad_token_id": None, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    return type(config.text_config)(**(_copy(config.text_config) | ids))


def _text_name(name: str) -> str | None:
    if name.startswith(_TEXT):
        return "model." + name.removeprefix(_TEXT)
    return name if name == _HEAD else None


def _has_audio_view(config: MegaMMConfig) -> bool:
    """The stock feature extractor takes no means of bands away: it would feed the model what it never heard."""
    stock = config.audio_config is not None and config.text_config.model_type == "qwen3"
    return stock and config.audio_features["normalize"] == "none"


def _audio_config(config: MegaMMConfig) -> PreTrainedConfig:
    return Qwen3ASRConfig(
        audio_config=_copy(config.audio_config),
        text_config=_copy(config.text_config),
        audio_token_id=config.audio_token_id,
        # The stock class stamps words with a token of its own that we do not have: padding is never generated.
        timestamp_token_id=config.pad_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _audio_name(name: str) -> str | None:
    return name if name.startswith((_TEXT, "model.audio_tower.", _AUDIO_PROJECTOR, _HEAD)) else None


def _image_config(config: MegaMMConfig) -> PreTrainedConfig:
    return Lfm2VlConfig(
        vision_config=_copy(config.vision_config),
        text_config=_copy(config.text_config),
        image_token_id=config.image_token_id,
        downsample_factor=config.image_features["merge"],
        projector_hidden_size=config.projector_hidden_size,
        projector_hidden_act=config.projector_hidden_act,
        projector_use_layernorm=config.projector_use_layernorm,
        projector_bias=config.projector_bias,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _image_name(name: str) -> str | None:
    if name.startswith(_VISION_PROJECTOR):
        return _AUDIO_PROJECTOR + name.removeprefix(_VISION_PROJECTOR)
    return name if name.startswith((_TEXT, "model.vision_tower.", _HEAD)) else None


VIEWS: dict[str, View] = {
    "text": View(lambda config: True, _text_config, _text_name, AutoModelForCausalLM.from_config),
    "audio": View(
        _has_audio_view,
        _audio_config,
        _audio_name,
        Qwen3ASRForConditionalGeneration,
    ),
    "image": View(
        lambda config: config.vision_config is not None and config.is_patch_tower,
        _image_config,
        _image_name,
        Lfm2VlForConditionalGeneration,
    ),
}
"""Name of a view to its stock class."""
