"""Random changes of training media that leave planned lengths as they are.

What is drawn depends on the run's seed and the sample's position alone, so a resumed run, at any scale, repeats it, and
another epoch draws anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamm.config import Augment
from megamm.data.order import derive_key, permute

_FULL_CIRCLE = 360.0
_NUM_POSITIONS = 1 << 62
# Sets the draws of variants apart from what else is derived from the seed.
_VARIANTS = 0x5EED


def variants_at(seed: int, positions: np.ndarray, num_variants: int) -> np.ndarray:
    """Which variant of its planned lengths the sample at each position takes: drawn evenly, by seed and position alone.

    Args:
        seed: Of the run.
        positions: int64[n].
        num_variants: Of the dataset.

    Returns:
        int64[n], each below `num_variants`.
    """
    if num_variants == 1:
        return np.zeros_like(positions)
    return permute(positions, _NUM_POSITIONS, derive_key(seed, _VARIANTS)) % num_variants


@dataclass(frozen=True, slots=True)
class Changes:
    """What happens to the media of one sample. State: the generator, which its media share in their order."""

    augment: Augment
    random: np.random.Generator

    @classmethod
    def at(cls, augment: Augment, seed: int, position: int) -> Changes | None:
        """The changes at a position of the run; None where nothing is to be changed."""
        return None if augment == Augment() else cls(augment, np.random.default_rng([seed, position]))

    def picture(self, picture):
        """A `PIL.Image` in RGB, shifted, zoomed, rotated, mirrored and brightened; its size stays. Edges are continued."""
        from PIL import Image, ImageEnhance

        augment, random = self.augment, self.random
        shift_x, shift_y, zoom, angle, light = random.uniform(-1, 1, 5)
        if augment.image_flip and random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augment.image_shift or augment.image_zoom or augment.image_rotate_degrees:
            width, height = picture.size
            border = max(width, height)
            continued = Image.fromarray(np.pad(np.asarray(picture), ((border, border), (border, border), (0, 0)), mode="edge"))
            scale = 1.0 + zoom * augment.image_zoom
            turn = 2 * np.pi * angle * augment.image_rotate_degrees / _FULL_CIRCLE
            cos, sin = np.cos(turn) / scale, np.sin(turn) / scale
            middle_x, middle_y = width / 2, height / 2
            from_x = middle_x + border + shift_x * augment.image_shift * width
            from_y = middle_y + border + shift_y * augment.image_shift * height
            # Maps each pixel of the result to where it comes from.
            matrix = (cos, -sin, from_x - cos * middle_x + sin * middle_y, sin, cos, from_y - sin * middle_x - cos * middle_y)
            picture = continued.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        if augment.image_brightness:
            picture = ImageEnhance.Brightness(picture).enhance(1.0 + light * augment.image_brightness)
        return picture

    def wave(self, wave: np.ndarray) -> np.ndarray:
        """float32[n], louder or quieter, with white noise."""
        augment, random = self.augment, self.random
        if augment.audio_gain_db:
            wave = wave * np.float32(10 ** (random.uniform(-1, 1) * augment.audio_gain_db / 20))
        if augment.audio_noise:
            level = random.uniform(0, augment.audio_noise) * float(np.sqrt(np.mean(np.square(wave), dtype=np.float64)))
            wave = wave + np.float32(level) * random.standard_normal(len(wave), dtype=np.float32)
        return wave

    def mel(self, mel_MF: np.ndarray) -> np.ndarray:
        """float32[M, F] with a stretch of frames and a band of frequencies set to its minimum.

        Source: SpecAugment, Park et al. 2019, section 2 (one mask each, no warping).
        """
        num_mel, num_frames = mel_MF.shape
        low = mel_MF.min()
        masked = mel_MF.copy()
        width = self.random.integers(0, min(self.augment.audio_mask_frames, num_frames // 2) + 1)
        start = self.random.integers(0, num_frames - width + 1)
        masked[:, start : start + width] = low
        width = self.random.integers(0, min(self.augment.audio_mask_bands, num_mel // 2) + 1)
        start = self.random.integers(0, num_mel - width + 1)
        masked[start : start + width] = low
        return masked
