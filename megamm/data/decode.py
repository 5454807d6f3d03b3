"""Bytes of a picture or a sound to the input of its tower, equal to what the exported processor computes.

Limits are checked on what the header states, before anything is allocated. Legend: H, W pixels, P patches, M mel bands,
F mel frames.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np

from megamm.config import AudioFeatures, ImageFeatures, Limits
from megamm.core.lengths import AUDIO_CHUNK_FRAMES, audio_num_tokens, image_num_tokens
from megamm.core.types import AudioInput, ImageInput
from megamm.data.augment import Changes
from megamm.data.features import DEFAULT_LIMITS, check_pixels, check_sound, image_grid, played_rate, resampled_length
from megamm.data.media import MediaError, exif_orientation, open_image, read_facts

# PIL.Image.Transpose of each EXIF orientation: what brings the stored pixels upright.
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_MAX_MEL_HZ = 8000.0


def image_input(content: bytes, features: ImageFeatures, *, limits: Limits = DEFAULT_LIMITS, changes: Changes | None = None) -> ImageInput:
    """Decode a picture: upright, RGB, resized, normalised and cut into patches (or kept as a square for a CNN tower).

    Transparent pictures are laid on white. Animations give their first frame.

    Args:
        content: A JPEG, PNG or WebP file.
        features: How the tower wants it.
        limits: What is refused.
        changes: Augmentation.

    Raises:
        MediaError: Not a picture, damaged, or beyond the limit.

    Source: equal to transformers' `Siglip2ImageProcessorPil` where `merge` is 1.
    """
    from PIL import Image

    with open_image(io.BytesIO(content)) as opened:
        check_pixels(opened.width, opened.height, limits)
        orientation = exif_orientation(opened)
        try:
            picture = _rgb(opened)
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise MediaError(f"the picture cannot be decoded ({error})") from None
    if orientation in _UPRIGHT:
        picture = picture.transpose(Image.Transpose(_UPRIGHT[orientation]))
    if changes is not None:
        picture = changes.picture(picture)
    grid = image_grid(picture.width, picture.height, features)
    side = features.patch_size if features.kind == "naflex" else features.stride
    resized = np.asarray(picture.resize((grid[1] * side, grid[0] * side), Image.Resampling.BILINEAR))
    if features.kind == "naflex":
        # Patches in rows from the top left; each patch row by row, channels last.
        strips = resized.reshape(grid[0], side, grid[1], side * 3).transpose(0, 2, 1, 3)
        pixels = _normalised(strips, features).reshape(grid[0] * grid[1], side * side * 3)
    else:
        lines = _normalised(resized.reshape(resized.shape[0], -1), features)
        pixels = np.ascontiguousarray(lines.reshape(resized.shape).transpose(2, 0, 1))
    return ImageInput(pixels, grid, image_num_tokens(grid, features.merge))


def audio_input(
    content: bytes,
    features: AudioFeatures,
    *,
    limits: Limits = DEFAULT_LIMITS,
    changes: Changes | None = None,
    speed: float = 1.0,
) -> AudioInput:
    """Decode a sound: mono, at the model's rate, log-mel.

    Args:
        content: A WAV, FLAC, OGG or MP3 file.
        features: How the tower wants it.
        limits: What is refused.
        changes: Augmentation.
        speed: It is played so much faster.

    Raises:
        MediaError: Not a sound, damaged, empty, not finite, or longer than `features.max_seconds`.
    """
    import soundfile

    facts = read_facts("audio", io.BytesIO(content))
    check_sound(facts.num_frames, facts.rate_hz, features, limits)
    try:
        wave_FC, rate_hz = soundfile.read(io.BytesIO(content), frames=facts.num_frames, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise MediaError(f"the sound cannot be decoded ({error})") from None
    if len(wave_FC) != facts.num_frames:
        raise MediaError(f"the sound has {len(wave_FC)} samples, its header says {facts.num_frames}")
    wave = wave_FC.mean(axis=1) if wave_FC.shape[1] > 1 else wave_FC[:, 0]
    if not np.isfinite(wave).all():
        raise MediaError("the sound holds samples that are not finite numbers")
    wave = _resampled(wave, played_rate(rate_hz, speed), features.rate_hz)
    mel = log_mel(wave if changes is None else changes.wave(wave), features)
    if changes is not None:
        mel = changes.mel(mel)
    return AudioInput(mel, audio_num_tokens(mel.shape[1]))


def log_mel(wave: np.ndarray, features: AudioFeatures) -> np.ndarray:
    """Log-mel of one sound without padding beyond `features.min_samples`.

    Args:
        wave: float32[n], mono at the model's rate.
        features: Bands, window and hop.

    Returns:
        float32[M, F].

    Source: transformers, `Qwen3ASRFeatureExtractor`, on the sound alone.
    """
    import torch

    if len(wave) < features.min_samples:
        wave = np.pad(wave, (0, features.min_samples - len(wave)))
    hop, size = features.hop_length, features.n_fft
    padded = torch.from_numpy(np.pad(wave, size // 2, mode="reflect"))
    num_frames = len(wave) // hop
    window, filters = torch.hann_window(size), torch.from_numpy(_mel_filters(features.num_mel, size, features.rate_hz))
    mel = torch.empty(features.num_mel, num_frames)
    # A chunk at a time stays in the cache and below the size from which malloc returns fresh pages: twice as fast.
    for start in range(0, num_frames, AUDIO_CHUNK_FRAMES):
        end = min(start + AUDIO_CHUNK_FRAMES, num_frames)
        chunk = padded[start * hop : (end - 1) * hop + size]
        spectrum = torch.stft(chunk, size, hop, window=window, center=False, return_complex=True)
        torch.matmul(filters, spectrum.abs().square_(), out=mel[:, start:end])
    mel = mel.clamp_(min=1e-10).log10_()
    return torch.maximum(mel, mel.max() - 8.0).add_(4.0).div_(4.0).numpy()


@lru_cache(maxsize=8)
def _mel_filters(num_mel: int, n_fft: int, rate_hz: int) -> np.ndarray:
    """float32[M, n_fft // 2 + 1]."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=num_mel,
        min_frequency=0.0,
        max_frequency=_MAX_MEL_HZ,
        sampling_rate=rate_hz,
        norm="slaney",
        mel_scale="slaney",
    )
    return filters.T.astype(np.float32)


def _resampled(wave: np.ndarray, rate_hz: int, target_hz: int) -> np.ndarray:
    """`wave` at `target_hz`, with exactly the planned number of samples (the resampler may round otherwise)."""
    if rate_hz == target_hz:
        return wave
    import soxr

    wanted = resampled_length(len(wave), rate_hz, target_hz)
    result = soxr.resample(wave, rate_hz, target_hz)[:wanted]
    return np.pad(result, (0, wanted - len(result)))


def _normalised(values: np.ndarray, features: ImageFeatures) -> np.ndarray:
    """(x / 255 - mean) / std of values whose last axis is pixels x channels; long inner loops are what makes it fast."""
    num_pixels = values.shape[-1] // 3
    mean, std = np.array(features.mean), np.array(features.std)
    result = np.empty(values.shape, dtype=np.float32)
    np.multiply(values, np.tile(1 / (255 * std), num_pixels).astype(np.float32), out=result)
    result -= np.tile(mean / std, num_pixels).astype(np.float32)
    return result


def _rgb(image):
    """Any mode as RGB: 16-bit scaled instead of clipped, transparency on white."""
    from PIL import Image

    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
