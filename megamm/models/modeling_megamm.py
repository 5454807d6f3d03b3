"""The composed model: stock towers through the Auto classes, projectors, one decoder.

Shape legend: B rows, S tokens of a row, N pictures or sounds, P patches, M mel bands, F mel frames, E decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForMultimodalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput, can_return_tuple

from megamm.core.lengths import AUDIO_CHUNK_FRAMES

from .adapters import attach
from .attention import DOCUMENT_ATTENTION, make_documents
from .configuration_megamm import MegaMMConfig
from .loss import LinearHead
from .parts import AudioProjector, VisionProjector, freeze_batch_norms, merge_neighbours, nothing_of, place


@dataclass
class MegaMMOutput(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: Scalar, sum of weight times negative log likelihood over supervised tokens, in fp32; None without labels.
        token_losses: float32[B, S], unweighted and detached, 0 where nothing is supervised; None without labels.
        logits: float[B, S, V]; None with labels, because they never exist at once.
        past_key_values: The KV cache, when one is used.
        hidden_states: Of the decoder, when asked for.
        attentions: Of the decoder, when asked for.
        head_logits: What the head says of each document, when asked for.
    """

    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    head_logits: dict[str, torch.Tensor] | None = None


class MegaMMPreTrainedModel(PreTrainedModel):
    """What the two model classes share: configuration class and abilities."""

    config_class = MegaMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Rounded variances of a convolutional tower would be lost for good: they do not train.
    _keep_in_fp32_modules_strict = {"running_mean", "running_var"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MegaMMModel(MegaMMPreTrainedModel):
    """Towers, projectors and decoder without a head.

    Attributes:
        run_every_tower: The modality contract of training under ZeRO-3. When True every forward runs every tower and
            projector exactly once, in one order, whatever the batch holds: a tower without input runs its smallest
            dummy, whose output enters the embeddings times zero. Ranks then gather the same parameters in the same
            order, and an absent tower gets gradients that are zero instead of none.
    """

    def __init__(self, config: MegaMMConfig):
        super().__init__(config)
        implementation = config.text_config._attn_implementation or config._attn_implementation
        if implementation == "sdpa":
            config.text_config._attn_implementation = DOCUMENT_ATTENTION
            if config.vision_config is not None and config.is_patch_tower:
                config.vision_config._attn_implementation = DOCUMENT_ATTENTION
        self.language_model = AutoModel.from_config(config.text_config)
        self.vision_tower = self.vision_projector = self.audio_tower = self.multi_modal_projector = None
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.vision_projector = VisionProjector(config)
            freeze_batch_norms(self.vision_tower)
        if config.audio_config is not None:
            self.audio_tower = AutoModel.from_config(config.audio_config)
            self.multi_modal_projector = AudioProjector(config)
        self.run_every_tower = False
        attach(self, config.adapter)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        tower_states: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Embeddings of pictures in reading order, one picture after the other.

        Args:
            pixel_values: float[N, P, patch² x 3] for a NaFlex tower, float[N, 3, H, W] for a fixed-size one.
            pixel_attention_mask: int64[N, P], 1 for real patches (NaFlex).
            spatial_shapes: int64[N, 2], rows and columns in patches (NaFlex).
            tower_states: Gets `vision`, float[rows, columns, channels] of each picture, before the projector; for a head.
            kwargs: Ignored.

        Returns:
            float[tokens, E].
        """
        pixel_values = pixel_values.to(self.vision_projector.linear_1.weight.dtype)
        if self.config.is_patch_tower:
            maps = self._patch_maps(pixel_values, pixel_attention_mask, spatial_shapes)
        else:
            hidden = self.vision_tower(pixel_values=pixel_values).last_hidden_state
            maps = list(self._feature_map(hidden, pixel_values.shape[-1]))
        if tower_states is not None:
            tower_states["vision"] = maps
        merge = self.config.image_features["merge"]
        return self.vision_projector(torch.cat([merge_neighbours(one, merge) for one in maps]))

    def _patch_maps(self, pixel_values: torch.Tensor, mask: torch.Tensor, spatial_shapes: torch.Tensor) -> list[torch.Tensor]:
        """float[rows, columns, channels] of each picture that a NaFlex tower sees.

        The tower's own forward pads all pictures to the largest; its layers on packed patches give the same without the padding.
        """
        tower = self.vision_tower
        grids = spatial_shapes.tolist()
        sizes = [rows * columns for rows, columns in grids]
        if tower.config._attn_implementation != DOCUMENT_ATTENTION or getattr(tower, "use_head", False):
            padded = tower(pixel_values=pixel_values, pixel_attention_mask=mask, spatial_shapes=spatial_shapes).last_hidden_state
            real = [one[:size] for one, size in zip(padded, sizes, strict=True)]
        else:
            embedded = tower.embeddings(pixel_values, spatial_shapes)
            packed = torch.cat([one[:size] for one, size in zip(embedded, sizes, strict=True)])[None]
            hidden = tower.encoder(inputs_embeds=packed, attention_mask=make_documents([sizes], None, packed))
            real = tower.post_layernorm(hidden.last_hidden_state)[0].split(sizes)
        return [one.view(rows, columns, -1) for one, (rows, columns) in zip(real, grids, strict=True)]

    def _feature_map(self, hidden: torch.Tensor, side: int) -> torch.Tensor:
        """float[N, rows, columns, channels] of a fixed-size tower that returns a map or a sequence of patches."""
        if hidden.dim() == 4:
            return hidden.permute(0, 2, 3, 1)
        cells = side // self.config.image_features["stride"]
        if hidden.shape[1] != cells * cells:
            raise ValueError(
                f"the vision tower returns {hidden.shape[1]} positions for {side} pixels at stride "
                f"{self.config.image_features['stride']}, not {cells * cells}; "
                "set image_features.stride, or take a tower without extra tokens"
            )
        return hidden.view(hidden.shape[0], cells, cells, -1)

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor,
        tower_states: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Embeddings of sounds, one sound after the other.

        Args:
            input_features: float[N, M, F], log-mel, zero-padded to a multiple of 100 frames.
            input_features_mask: int64[N, F], 1 for real frames.
            tower_states: Gets `audio`, float[tokens, channels] of all sounds, before the projector; for a head.
            kwargs: Ignored.

        Returns:
            float[tokens, E].
        """
        input_features = input_features.to(self.multi_modal_projector.linear_1.weight.dtype)
        hidden = self.audio_tower(input_features=input_features, input_features_mask=input_features_mask).last_hidden_state
        if tower_states is not None:
            tower_states["audio"] = hidden
        return self.multi_modal_projector(hidden)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
        num_padding: Sequence[int] | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        tower_states: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the towers, put their embeddings in the placeholders' places and run the decoder.

        See `MegaMMForConditionalGeneration.forward` for the arguments; `tower_states` gets what towers that have something to see return.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        pictures = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        sounds = {"input_features": input_features, "input_features_mask": input_features_mask}
        # Only the prefill must hold all its media; later steps may sample the same ids as ordinary tokens.
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        for what, tower, media in (("image", self.vision_tower, pictures), ("audio", self.audio_tower, sounds)):
            ids = input_ids if is_prefill or has_media(media) else None
            inputs_embeds = self._add_media(what, tower, media, inputs_embeds, ids, tower_states)
        if document_lengths is not None:
            self._check_packing(attention_mask, past_key_values)
            kwargs["documents"] = make_documents(document_lengths, num_padding, inputs_embeds)
            # A mask that is already 4-d is handed through as it is: without elements it costs nothing and is never read.
            attention_mask = inputs_embeds.new_empty((inputs_embeds.shape[0], 1, 0, 0))
            use_cache = False
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _add_media(
        self,
        what: str,
        tower: nn.Module | None,
        media: dict[str, torch.Tensor | None],
        embeds: torch.Tensor,
        ids: torch.Tensor | None,
        tower_states: dict[str, Any] | None,
    ) -> torch.Tensor:
        """Run one tower on its input, on its dummy or not at all, and put what it returns where it belongs."""
        if tower is None:
            if has_media(media):
                raise ValueError(f"this model has no {what} tower; leave out {', '.join(media)}")
            return embeds
        run = self.get_image_features if what == "image" else self.get_audio_features
        features = run(**media, tower_states=tower_states) if has_media(media) else None
        if features is None and self.run_every_tower:
            embeds = embeds + nothing_of(run(**(self._dummy_picture(embeds) if what == "image" else self._dummy_sound(embeds))), embeds)
        if ids is None:
            return embeds
        return place(embeds, ids, getattr(self.config, f"{what}_token_id"), features, what)

    def _check_packing(self, attention_mask: torch.Tensor | None, past_key_values: Cache | None) -> None:
        if attention_mask is not None or past_key_values is not None:
            raise ValueError("packed rows (document_lengths) take no attention_mask and no past_key_values; leave them out")
        implementation = self.config.text_config._attn_implementation
        if implementation != DOCUMENT_ATTENTION:
            raise ValueError(
                f"packed rows need the decoder's attention {DOCUMENT_ATTENTION!r}, not {implementation!r}; load it with 'sdpa'"
            )

    def _dummy_picture(self, like: torch.Tensor) -> dict[str, torch.Tensor | None]:
        features = self.config.image_features
        merge = features["merge"]
        if self.config.is_patch_tower:
            return {
                "pixel_values": like.new_zeros(1, merge * merge, 3 * features["patch_size"] ** 2),
                "pixel_attention_mask": like.new_ones((1, merge * merge), dtype=torch.long),
                "spatial_shapes": torch.full((1, 2), merge, device=like.device),
            }
        is_convolutional = hasattr(self.config.vision_config, "hidden_sizes")
        side = features["stride"] * merge if is_convolutional else features["size"]
        return {"pixel_values": like.new_zeros(1, 3, side, side)}

    def _dummy_sound(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = like.new_zeros((1, AUDIO_CHUNK_FRAMES), dtype=torch.long)
        mask[:, 0] = 1
        return {
            "input_features": like.new_zeros(1, self.config.audio_config.num_mel_bins, AUDIO_CHUNK_FRAMES),
            "input_features_mask": mask,
        }


class MegaMMForConditionalGeneration(MegaMMPreTrainedModel, GenerationMixin):
    """The composed model with its language-modelling head.

    Attributes:
        loss_chunk_tokens: Supervised tokens whose logits exist at once while the loss is computed.
        head: What answers from the backbone's states in place of tokens, set by whoever built it; None without one.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegaMMConfig):
        super().__init__(config)
        self.model = MegaMMModel(config)
        self.lm_head = LinearHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.loss_chunk_tokens = 1024
        self.head = None
        self.post_init()

    @property
    def run_every_tower(self) -> bool:
        """The modality contract, see `MegaMMModel`."""
        return self.model.run_every_tower

    @run_every_tower.setter
    def run_every_tower(self, value: bool) -> None:
        self.model.run_every_tower = value

    def get_image_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `MegaMMModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_audio_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `MegaMMModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **model_kwargs: Any
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeat rows for beams and samples, each copy of a row with all its media; the stock way would mix rows of several."""
        media: dict[str, torch.Tensor] = {}
        for start_id, names in (
            (self.config.image_start_token_id, ("pixel_values", "pixel_attention_mask", "spatial_shapes")),
            (self.config.audio_start_token_id, ("input_features", "input_features_mask")),
        ):
            given = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
            if not given or expand_size == 1:
                media |= given
                continue
            counts = (input_ids == start_id).sum(1).tolist()
            if sum(counts) != len(given[names[0]]):
                raise ValueError(f"{len(given[names[0]])} {names[0]} but {sum(counts)} start tokens (id {start_id}); put one before each")
            rows = torch.arange(sum(counts)).split(counts)
            order = torch.cat([row for row in rows for _ in range(expand_size)])
            media |= {name: value[order.to(value.device)] for name, value in given.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return input_ids, model_kwargs | media

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
        num_padding: Sequence[int] | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        run_head: bool = False,
        head_targets: Any = None,
        **kwargs: Any,
    ) -> MegaMMOutput:
        """Run the model on packed rows (training) or on padded sequences with a KV cache (generation).

        Args:
            input_ids: int64[B, S]; placeholders stand where pictures and sounds go.
            position_ids: int64[B, S], restarting with every document of a packed row.
            labels: int64[B, S], the token that each position has to predict (already shifted), -100 for none.
            weights: float32[B, S], loss weight of each label; None for 1.
            document_lengths: For each row the lengths of its documents, summing to S; None for unpacked rows.
            num_padding: For each row the tokens of its last document if that is padding, else 0.
            pixel_values: float[N, P, patch² x 3] or float[N, 3, H, W], pictures in the order of their placeholders.
            pixel_attention_mask: int64[N, P], 1 for real patches (NaFlex).
            spatial_shapes: int64[N, 2], rows and columns in patches (NaFlex).
            input_features: float[N, M, F], log-mel of sounds in the order of their placeholders.
            input_features_mask: int64[N, F], 1 for real frames.
            attention_mask: int64[B, S] for padded, unpacked rows.
            past_key_values: KV cache of earlier tokens.
            inputs_embeds: float[B, S, E] in place of `input_ids`; media need `input_ids`.
            use_cache: Whether to return a KV cache; never with packed rows.
            logits_to_keep: Number of last positions, or positions, whose logits are wanted; 0 for all.
            run_head: Ask the head about each document of packed rows; on every rank or on none.
            head_targets: What it is to answer; wanted with labels, which a head's documents do not have: each document's loss then
                joins `loss`, times its weight, and stands at the document's last token in `token_losses`.
            kwargs: Passed to the decoder.

        Raises:
            ValueError: Placeholders and embeddings differ in number, or rows are packed and masked at once.
        """
        tower_states: dict[str, Any] | None = {} if run_head else None
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            document_lengths=document_lengths,
            num_padding=num_padding,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None else use_cache,
            tower_states=tower_states,
            **kwargs,
        )
        result = MegaMMOutput(past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result.logits = self.lm_head(outputs.last_hidden_state[:, keep])
        else:
            result.loss, result.token_losses = self.lm_head(outputs.last_hidden_state, labels, weights, self.loss_chunk_tokens)
        if run_head:
            # Run here, because ZeRO-3 gathers its weights only inside this forward.
            result.head_logits, loss, token_losses = self.head(
                hidden=outputs.last_hidden_state,
                towers=tower_states,
                input_ids=input_ids,
                document_lengths=document_lengths,
                num_padding=num_padding,
                grids=spatial_shapes,
                targets=head_targets,
            )
            if labels is not None:
                result.loss, result.token_losses = result.loss + loss, result.token_losses + token_losses
        return result


def has_media(media: dict[str, torch.Tensor | None]) -> bool:
    """Whether a tower's first argument, the pixels or the features, is there."""
    return next(iter(media.values())) is not None


AutoModel.register(MegaMMConfig, MegaMMModel, exist_ok=True)
AutoModelForMultimodalLM.register(MegaMMConfig, MegaMMForConditionalGeneration, exist_ok=True)

__all__ = ["MegaMMForConditionalGeneration", "MegaMMModel", "MegaMMOutput", "MegaMMPreTrainedModel"]
