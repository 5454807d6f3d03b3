"""What a model is asked: messages and media become token ids and tower inputs, prompts become a left-padded batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megamm.config import Limits
from megamm.core.errors import DataError
from megamm.core.lengths import AUDIO_CHUNK_FRAMES
from megamm.core.types import AudioInput, ImageInput, Message
from megamm.data.media.decode import audio_input, image_input
from megamm.data.media.files import MediaError
from megamm.data.samples.shapes import seen_shapes
from megamm.inference.load import Loaded
from megamm.tasks import template


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready for the model.

    Attributes:
        input_ids: int32[T], ending with `<|assistant|>`.
        images: In the order of their placeholders.
        audios: In the order of their placeholders.
    """

    input_ids: np.ndarray
    images: Sequence[ImageInput] = ()
    audios: Sequence[AudioInput] = ()


def make_prompt(loaded: Loaded, messages: Sequence[Message], media: Mapping[str, bytes]) -> Prompt:
    """Decode the media that `messages` name, as training does, and lay the chat out up to where the answer begins.

    Args:
        loaded: The model that is asked.
        messages: A chat that ends before an answer.
        media: Member -> encoded bytes of a picture or a sound.

    Raises:
        DataError: Names the medium that is missing, cannot be decoded or has no tower in this model; or the chat has its answer already.
    """
    rules = loaded.media
    images = _inputs(image_input, rules.image, rules.limits, _contents("image", rules.image, messages, media))
    audios = _inputs(audio_input, rules.audio, rules.limits, _contents("audio", rules.audio, messages, media))
    ids = template.prompt(
        messages,
        loaded.tokenizer,
        image_tokens=[image.num_tokens for image in images],
        audio_tokens=[audio.num_tokens for audio in audios],
        shapes=seen_shapes(messages, media, [image.view for image in images], rules),
    )
    return Prompt(ids, images, audios)


def left_padded(prompts: Sequence[Prompt], pad_id: int, device: torch.device, *, least_tokens: int = 0) -> dict[str, Any]:
    """Join prompts into the arguments of the model's `generate` or forward.

    Padding stands on the left, so that every prompt ends in the last column and new tokens follow it directly.

    Args:
        prompts: One a row.
        pad_id: Id of padding.
        device: Where the tensors go.
        least_tokens: Rows are made so long even where no prompt is.

    Returns:
        `input_ids` and `attention_mask` int64[B, S]; `pixel_values` with `pixel_attention_mask` and `spatial_shapes` (patch
        towers), `input_features` with `input_features_mask`, where any prompt has such media.
    """
    num_tokens = max(least_tokens, *(len(prompt.input_ids) for prompt in prompts))
    input_ids = np.full((len(prompts), num_tokens), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, num_tokens - len(prompt.input_ids) :] = prompt.input_ids
        mask[row, num_tokens - len(prompt.input_ids) :] = 1
    arrays = {"input_ids": input_ids, "attention_mask": mask}
    arrays |= media_arrays(
        [image for prompt in prompts for image in prompt.images], [audio for prompt in prompts for audio in prompt.audios]
    )
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def media_arrays(images: Sequence[ImageInput], audios: Sequence[AudioInput]) -> dict[str, np.ndarray]:
    """Tower inputs as the model's forward takes them, padded to a common size; what is not there is left out.

    Args:
        images: In the order of their placeholders, row after row.
        audios: Likewise.
    """
    return _image_arrays(images) | _audio_arrays(audios)


def _image_arrays(images: Sequence[ImageInput]) -> dict[str, np.ndarray]:
    if not images:
        return {}
    if images[0].pixels.ndim == 3:
        return {"pixel_values": np.stack([image.pixels for image in images])}
    num_patches = max(len(image.pixels) for image in images)
    pixels = np.zeros((len(images), num_patches, images[0].pixels.shape[1]), dtype=np.float32)
    mask = np.zeros((len(images), num_patches), dtype=np.int64)
    for row, image in enumerate(images):
        pixels[row, : len(image.pixels)] = image.pixels
        mask[row, : len(image.pixels)] = 1
    shapes = np.array([image.grid for image in images], dtype=np.int64)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _audio_arrays(audios: Sequence[AudioInput]) -> dict[str, np.ndarray]:
    if not audios:
        return {}
    longest = max(audio.mel.shape[1] for audio in audios)
    num_frames = -(-longest // AUDIO_CHUNK_FRAMES) * AUDIO_CHUNK_FRAMES
    mel = np.zeros((len(audios), audios[0].mel.shape[0], num_frames), dtype=np.float32)
    mask = np.zeros((len(audios), num_frames), dtype=np.int64)
    for row, audio in enumerate(audios):
        mel[row, :, : audio.mel.shape[1]] = audio.mel
        mask[row, : audio.mel.shape[1]] = 1
    return {"input_features": mel, "input_features_mask": mask}


def _inputs(decode: Callable[..., Any], features: Any, limits: Limits, contents: Sequence[tuple[str, bytes]]) -> list[Any]:
    inputs = []
    for member, content in contents:
        try:
            inputs.append(decode(content, features, limits=limits))
        except MediaError as error:
            raise MediaError(f"{member}: {error}") from error
    return inputs


def _contents(type_name: str, features: Any, messages: Sequence[Message], media: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    parts = [part for message in messages for part in message.content if part.type == type_name]
    if parts and features is None:
        raise DataError(f"the prompt holds an {type_name} part, but this model has no tower for it; ask a model that has one")
    for part in parts:
        if part.member not in media:
            raise DataError(f"the prompt names member {part.member}, which is missing; the members are {', '.join(media) or 'none'}")
    return [(part.member, media[part.member]) for part in parts]
