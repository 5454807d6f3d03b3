"""Bytes of a picture or a sound to the input of its tower, equal to what the exported processor computes.

Legend: H, W pixels, P patches, M mel bands, F mel frames.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from megamm.config import AudioFeatures, ImageFeatures, Limits
from megamm.core.geometry import Affine, PictureView
from megamm.core.lengths import audio_num_tokens, image_num_tokens
from megamm.core.types import AudioInput, ImageInput
from megamm.data.media.augment import Changes
from megamm.data.media.features import image_grid, played_rate, resampled_length
from megamm.data.media.files import DEFAULT_LIMITS, MediaError, decode_picture, decode_sound

_MAX_MEL_HZ = 8000.0
_CHUNK_FRAMES = 200
_BLOCK_BANDS = 32

if TYPE_CHECKING:
    import torch


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

    picture = decode_picture(content, limits)
    # The grid is that of the picture itself, whatever changes: so it was planned.
    grid = image_grid(picture.width, picture.height, features)
    side = features.patch_size if features.kind == "naflex" else features.stride
    size = grid[1] * side, grid[0] * side
    view = PictureView.whole(picture.width, picture.height)
    if changes is None:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    else:
        changed, moved = changes.shape(picture, size)
        view = PictureView(picture.width, picture.height, moved.then(Affine.scale(1 / changed.width, 1 / changed.height)))
        picture = changes.colour(changed.resize(size, Image.Resampling.BILINEAR))
    resized = np.asarray(picture)
    if features.kind == "naflex":
        # Patches in rows from the top left; each patch row by row, channels last.
        strips = resized.reshape(grid[0], side, grid[1], side * 3).transpose(0, 2, 1, 3)
        pixels = _normalised(strips, features).reshape(grid[0] * grid[1], side * side * 3)
    else:
        lines = _normalised(resized.reshape(resized.shape[0], -1), features)
        pixels = np.ascontiguousarray(lines.reshape(resized.shape).transpose(2, 0, 1))
    return ImageInput(pixels, grid, image_num_tokens(grid, features.merge), view)


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
        MediaError: Not a sound, damaged, empty, not finite, too loud by far, or longer than `features.max_seconds`.
    """
    wave, rate_hz = decode_sound(content, features, limits)
    wave = _resampled(wave, played_rate(rate_hz, speed), features.rate_hz)
    mel = log_mel(wave if changes is None else changes.wave(wave), features)
    if not np.isfinite(mel).all():
        raise MediaError("the sound is so loud that its spectrum overflows; scale its samples to -1 … 1")
    if changes is not None:
        # Silence, or the sound's own mean where that has been taken away.
        mel = changes.mel(mel, blank=0.0 if features.normalize == "bands" else float(mel.min()))
    return AudioInput(mel, audio_num_tokens(mel.shape[1]))


def log_mel(wave: np.ndarray, features: AudioFeatures) -> np.ndarray:
    """Log-mel of one sound without padding beyond `features.min_samples`.

    Args:
        wave: float32[n], mono at the model's rate.
        features: Bands, window and hop.

    Returns:
        float32[M, F].

    Source: transformers, `Qwen3ASRFeatureExtractor`, on the sound alone; means as in Atal 1974 (cepstral mean subtraction), of mel bands.
    """
    import torch

    num_heard = max(len(wave) // features.hop_length, 1)
    if len(wave) < features.min_samples:
        wave = np.pad(wave, (0, features.min_samples - len(wave)))
    hop, size = features.hop_length, features.n_fft
    num_frames = len(wave) // hop
    padded = torch.from_numpy(np.pad(wave, size // 2, mode="reflect"))
    frames_FW = padded.as_strided((num_frames, size), (hop, 1))
    window, filters = _window(size), _filter_blocks(features.num_mel, size, features.rate_hz)
    mel_FM = torch.empty(num_frames, features.num_mel)
    # A chunk at a time stays in the cache and below the size from which malloc returns fresh pages.
    for start in range(0, num_frames, _CHUNK_FRAMES):
        chunk = slice(start, min(start + _CHUNK_FRAMES, num_frames))
        spectrum = torch.fft.rfft(frames_FW[chunk] * window)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        for bands, bins, weights in filters:
            torch.matmul(power[:, bins], weights, out=mel_FM[chunk, bands])
    mel_FM = mel_FM.clamp_(min=1e-10).log10_()
    mel_FM = torch.maximum(mel_FM, mel_FM.max() - 8.0).add_(4.0).div_(4.0)
    if features.normalize == "bands":
        # Silence behind a short sound is no part of it.
        mel_FM -= mel_FM[:num_heard].mean(dim=0)
    return mel_FM.T.contiguous().numpy()


@lru_cache(maxsize=8)
def _window(num_samples: int) -> torch.Tensor:
    """float32[num_samples]."""
    import torch

    return torch.hann_window(num_samples)


@lru_cache(maxsize=8)
def _filter_blocks(num_mel: int, n_fft: int, rate_hz: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """Neighbouring bands, the frequency bins that they hear, float32[bins, bands]: most of the whole matrix is zeros."""
    import torch

    filters, blocks = torch.from_numpy(_mel_filters(num_mel, n_fft, rate_hz)), []
    for start in range(0, num_mel, _BLOCK_BANDS):
        bands = slice(start, min(start + _BLOCK_BANDS, num_mel))
        heard = filters[bands].any(dim=0).nonzero()
        bins = slice(int(heard.min()), int(heard.max()) + 1) if len(heard) else slice(0, 1)
        blocks.append((bands, bins, filters[bands, bins].T.contiguous()))
    return blocks


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
    scale, shift = _scale_and_shift(features, values.shape[-1] // 3)
    result = np.empty(values.shape, dtype=np.float32)
    np.multiply(values, scale, out=result)
    result -= shift
    return result


@lru_cache(maxsize=16)
def _scale_and_shift(features: ImageFeatures, num_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """float32[num_pixels x 3] each."""
    mean, std = np.array(features.mean), np.array(features.std)
    return np.tile(1 / (255 * std), num_pixels).astype(np.float32), np.tile(mean / std, num_pixels).astype(np.float32)
