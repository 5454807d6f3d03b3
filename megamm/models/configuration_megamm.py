"""Configuration of the composed model: three stock sub-configurations and the facts that join them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_IMAGE_FEATURES = {
    "kind": "naflex",
    "patch_size": 16,
    "max_patches": 256,
    "max_scale": 100.0,
    "merge": 1,
    "size": 224,
    "stride": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
_AUDIO_FEATURES = {
    "rate_hz": 16000,
    "num_mel": 128,
    "hop_length": 160,
    "n_fft": 400,
    "min_samples": 8000,
    "normalize": "none",
    "max_seconds": 30.0,
}


class MegaMMConfig(PreTrainedConfig):
    """A text decoder, optionally with a vision and an audio tower, over one vocabulary.

    The vocabulary size lives in `text_config` and is final: text, control, location and code ids are laid out before the
    model is built, and embeddings are never resized.

    Attributes:
        text_config: Configuration of the decoder, any text model of `AutoModel`.
        vision_config: Configuration of the vision tower; None leaves pictures out.
        audio_config: Configuration of the audio tower (`qwen3_asr_encoder`); None leaves sounds out.
        image_features: How pictures become tower input: the fields of `megamm.config.schema.ImageFeatures`.
        audio_features: How sounds become tower input: the fields of `megamm.config.schema.AudioFeatures`.
        image_token_id: Placeholder of one picture token.
        audio_token_id: Placeholder of one sound token.
        image_start_token_id: Token before a picture's placeholders.
        image_end_token_id: Token after them.
        audio_start_token_id: Token before a sound's placeholders.
        audio_end_token_id: Token after them.
        adapter: What small trainable parts the model has: the fields of `megamm.config.schema.Adapter` that `adapters.attach` reads; None
            for none.
        end_token_id: Token that closes a message; generation stops there and at `eos_token_id`.
        projector_hidden_size: Width between the two layers of the vision projector; None takes the decoder's.
        projector_hidden_act: Activation of the vision projector.
        projector_use_layernorm: Whether the vision projector normalises its input.
        projector_bias: Whether the linear layers of the vision projector have biases.
    """

    model_type = "megamm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "audio_config": AutoConfig}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    image_features: dict | None = None
    audio_features: dict | None = None
    adapter: dict | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    audio_start_token_id: int | None = None
    audio_end_token_id: int | None = None
    end_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    projector_use_layernorm: bool = True
    projector_bias: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn dictionaries into configurations and derive what must agree with them."""
        self.text_config = _sub_config(self.text_config or {"model_type": "qwen3"})
        self.vision_config = _sub_config(self.vision_config)
        self.audio_config = _sub_config(self.audio_config)
        self.image_features = _IMAGE_FEATURES | (self.image_features or {})
        self.audio_features = _AUDIO_FEATURES | (self.audio_features or {})
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.text_config.hidden_size
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @property
    def vision_hidden_size(self) -> int:
        """Channels that the vision tower returns a position (the last stage's for a CNN)."""
        sizes = getattr(self.vision_config, "hidden_sizes", None)
        return sizes[-1] if sizes else self.vision_config.hidden_size

    @property
    def is_patch_tower(self) -> bool:
        """True where the vision tower takes patches of any aspect ratio (NaFlex), False where it takes squares."""
        return self.image_features["kind"] == "naflex"


def _sub_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    if not isinstance(value, dict):
        return value
    values = dict(value)
    return AutoConfig.for_model(values.pop("model_type"), **values)


AutoConfig.register("megamm", MegaMMConfig, exist_ok=True)

__all__ = ["MegaMMConfig"]
