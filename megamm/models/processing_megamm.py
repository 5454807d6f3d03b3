"""The processor of exported folders: text, pictures and sounds to the model's inputs, with the counts that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoProcessor, Qwen3ASRFeatureExtractor, Siglip2ImageProcessorPil, ViTImageProcessorPil
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from megamm.core.lengths import AUDIO_CHUNK_FRAMES, audio_num_tokens, image_num_tokens, patch_grid

from .configuration_megamm import MegaMMConfig


class MegaMMProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call: padded on the left, as generation needs it, and tensors of torch."""

    _defaults = {  # noqa: RUF012
        "text_kwargs": {"padding": True, "padding_side": "left"},
        "common_kwargs": {"return_tensors": "pt"},
    }


class MegaMMProcessor(ProcessorMixin):
    """Expands one placeholder a picture or sound to its tokens and makes the tower inputs.

    A sound's features do not depend on the sounds beside it: each is extracted alone and padded with zeros.

    Args:
        image_processor: Cuts patches (`Siglip2ImageProcessorPil`) or resizes to squares (`ViTImageProcessorPil`).
        feature_extractor: Log-mel features (`Qwen3ASRFeatureExtractor`).
        tokenizer: Knows the placeholders as `image_token` and `audio_token`.
        chat_template: Jinja template of a chat.
        merge: `merge` x `merge` neighbouring cells of the vision tower become one token.
        stride: Pixels a cell covers a side, for squares; None for patches.
        max_scale: Pictures that are cut into patches are enlarged at most by this factor.
        normalize: `bands` takes each mel band's mean over a sound away; `none` leaves sounds as they are.
    """

    valid_processor_kwargs = MegaMMProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        merge: int = 1,
        stride: int | None = None,
        max_scale: float = 100.0,
        normalize: str = "none",
    ):
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)
        self.merge = merge
        self.stride = stride
        self.max_scale = max_scale
        self.normalize = normalize
        self.image_token, self.audio_token = tokenizer.image_token, tokenizer.audio_token
        self.image_token_id, self.audio_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.audio_token])

    @classmethod
    def from_config(cls, config: MegaMMConfig, tokenizer: Any) -> MegaMMProcessor:
        """The processor that feeds a model of `config` as its training did, with the chat template of `tokenizer`."""
        image, audio = config.image_features, config.audio_features
        look = {"image_mean": list(image["mean"]), "image_std": list(image["std"]), "do_convert_rgb": True}
        if config.is_patch_tower:
            image_processor = Siglip2ImageProcessorPil(patch_size=image["patch_size"], max_num_patches=image["max_patches"], **look)
        else:
            image_processor = ViTImageProcessorPil(size={"height": image["size"], "width": image["size"]}, **look)
        feature_extractor = Qwen3ASRFeatureExtractor(
            feature_size=audio["num_mel"],
            sampling_rate=audio["rate_hz"],
            hop_length=audio["hop_length"],
            n_fft=audio["n_fft"],
            min_length=audio["min_samples"],
            chunk_length=int(audio["max_seconds"]),
        )
        stride = None if config.is_patch_tower else image["stride"]
        rules = (image["merge"], stride, image["max_scale"], audio["normalize"])
        return cls(image_processor, feature_extractor, tokenizer, tokenizer.chat_template, *rules)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one picture."""
        if self.stride is None:
            rows, columns = (int(size) for size in image_inputs["spatial_shapes"][image_idx])
        else:
            rows, columns = (size // self.stride for size in image_inputs["pixel_values"][image_idx].shape[-2:])
        return self.image_token * image_num_tokens((rows, columns), self.merge)

    def replace_audio_token(self, audio_inputs: dict[str, Any], audio_idx: int, **kwargs: Any) -> str:
        """The placeholders of one sound."""
        return self.audio_token * audio_num_tokens(int(audio_inputs["input_features_mask"][audio_idx].sum()))

    def prepare_inputs_layout(self, images: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """Open picture files as training does; transformers would drop their transparency instead of laying them on white."""
        return super().prepare_inputs_layout(images=_opened(images), **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        # Pictures are resized here, always by Pillow: the stock processors know no merging of patches, and with torchvision
        # installed they would resize in another way than training did.
        pictures = [self._resize(picture, **kwargs) for picture in make_flat_list_of_images(images)]
        inputs = self.image_processor(pictures, **{**kwargs, "do_resize": False})
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(pictures))]

    def _resize(self, picture: Any, **kwargs: Any) -> Image.Image:
        processor = self.image_processor
        picture = upright_rgb(picture if isinstance(picture, Image.Image) else to_pil_image(picture))
        if self.stride is not None:
            side = processor.size["height"]
            return picture.resize((side, side), Image.Resampling.BILINEAR)
        patch_size = kwargs.get("patch_size") or processor.patch_size
        max_patches = kwargs.get("max_num_patches") or processor.max_num_patches
        rows, columns = patch_grid(
            picture.height, picture.width, patch_size=patch_size, max_patches=max_patches, merge=self.merge, max_scale=self.max_scale
        )
        return picture.resize((columns * patch_size, rows * patch_size), Image.Resampling.BILINEAR)

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        kwargs = {**kwargs, "padding": True, "return_tensors": "np", "return_attention_mask": True}
        # The rate is ours unless the caller says otherwise, which the extractor then refuses.
        kwargs.setdefault("sampling_rate", self.feature_extractor.sampling_rate)
        clips = [self.feature_extractor([np.asarray(clip, dtype=np.float32)], n_window=AUDIO_CHUNK_FRAMES // 2, **kwargs) for clip in audio]
        if self.normalize == "bands":
            for clip, samples in zip(clips, audio, strict=True):
                num_heard = max(len(samples) // self.feature_extractor.hop_length, 1)
                clip["input_features"] = _without_band_means(clip["input_features"], clip["attention_mask"], num_heard)
        num_frames = max(clip["input_features"].shape[-1] for clip in clips)
        inputs = {
            "input_features": _stack([clip["input_features"] for clip in clips], num_frames),
            "input_features_mask": _stack([clip["attention_mask"] for clip in clips], num_frames).astype(np.int64),
        }
        return inputs, [self.replace_audio_token(inputs, index) for index in range(len(clips))]

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that a call may return."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "input_features", "input_features_mask"]


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Any picture as training sees it: turned by its EXIF, 16-bit scaled instead of clipped, transparency on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def _opened(images: Any) -> Any:
    """Local paths, alone or in nested lists, as pictures; everything else as it is."""
    if isinstance(images, (list, tuple)):
        return [_opened(one) for one in images]
    if isinstance(images, (str, Path)) and Path(images).is_file():
        with Image.open(images) as picture:
            return upright_rgb(picture)
    return images


def _without_band_means(mel: np.ndarray, mask: np.ndarray, num_heard: int) -> np.ndarray:
    """float32[1, M, F] minus each band's mean over the sound's own frames, zero outside of `mask`, int[1, F]."""
    return (mel - mel[..., :num_heard].mean(-1, keepdims=True)) * mask[:, None, :].astype(mel.dtype)


def _stack(arrays: list[np.ndarray], num_frames: int) -> np.ndarray:
    """Join arrays [1, ..., frames] along the first axis, padded with zeros to `num_frames`."""
    return np.concatenate([np.pad(one, [(0, 0)] * (one.ndim - 1) + [(0, num_frames - one.shape[-1])]) for one in arrays])


AutoProcessor.register(MegaMMConfig, MegaMMProcessor, exist_ok=True)

__all__ = ["MegaMMProcessor"]
