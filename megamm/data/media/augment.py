"""Random changes of training samples: of their media, and of the order of items.

What is drawn depends on the run's seed and the sample's position alone, so a resumed run, at any scale, repeats it, and
another epoch draws anew. Changes leave planned lengths as they are; the one that does not, the speed of sounds, is drawn by
the planner, which holds a length for each speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np

from megamm.config import Augment
from megamm.core.geometry import Affine
from megamm.core.types import Message, Part

_NUM_OCTAVES = 7


@dataclass(frozen=True, slots=True)
class Changes:
    """What happens to one sample. State: the generator, which its media share in their order.

    Every medium takes the same draws whatever is switched on, so that one more setting leaves the others' draws alone.
    """

    augment: Augment
    random: np.random.Generator

    @classmethod
    def at(cls, augment: Augment, seed: int, position: int) -> Changes | None:
        """The changes at a position of the run; None where nothing but lengths is to be changed."""
        return None if _changes_nothing(augment) else cls(augment, np.random.default_rng([seed, position]))

    def messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages whose items stand in another order, where they stand side by side: as many tokens as before."""
        if not self.augment.item_shuffle:
            return messages
        # Not of the generator that media share: their draws stay as they are.
        (random,) = self.random.spawn(1)
        return [replace(message, content=tuple(_shuffled_items(message.content, random))) for message in messages]

    def shape(self, picture, size: tuple[int, int]):
        """A `PIL.Image` in RGB that will be resized to `size`, cropped, mirrored, turned, shifted, zoomed and rotated.

        Edges are continued. A quarter turn fills the grid that was planned, so only pictures for a square one take it.

        Returns:
            The picture, and the `Affine` from the given one's pixel coordinates to its own.
        """
        from PIL import Image

        augment, moved = self.augment, Affine()
        area, ratio, place_x, place_y, mirror, shift_x, shift_y, zoom, angle, turns = self.random.random(10).tolist()
        if augment.image_crop or augment.image_stretch:
            box = _crop_box(picture.size, augment, (area, ratio, place_x, place_y))
            picture, moved = picture.crop(box), Affine.shift(-box[0], -box[1])
        if augment.image_flip and mirror < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            moved = moved.then(Affine(a=-1.0, c=picture.width))
        if augment.image_turns:
            for _ in range(int(4 * turns) if size[0] == size[1] else 2 * int(2 * turns)):
                moved = moved.then(Affine(a=0.0, b=1.0, d=-1.0, e=0.0, f=picture.width))
                picture = picture.transpose(Image.Transpose.ROTATE_90)
        if augment.image_shift or augment.image_zoom or augment.image_rotate_degrees:
            # More than twice the pixels that will be left of it show in no result, and a turn needs a border as wide as the picture.
            small = min(picture.width, 2 * size[0]), min(picture.height, 2 * size[1])
            if small != picture.size:
                moved = moved.then(Affine.scale(small[0] / picture.width, small[1] / picture.height))
                picture = picture.resize(small, Image.Resampling.BILINEAR)
            shift = _signed(shift_x) * augment.image_shift, _signed(shift_y) * augment.image_shift
            turn = math.radians(_signed(angle) * augment.image_rotate_degrees)
            picture, motion = _moved(picture, shift, scale=1.0 + _signed(zoom) * augment.image_zoom, turn=turn)
            moved = moved.then(motion)
        return picture, moved

    def colour(self, picture):
        """A `PIL.Image` in RGB with another brightness, contrast, saturation and hue."""
        from PIL import Image, ImageEnhance

        augment = self.augment
        light, contrast, saturation, hue = (_signed(share) for share in self.random.random(4).tolist())
        if augment.image_brightness:
            picture = ImageEnhance.Brightness(picture).enhance(1.0 + light * augment.image_brightness)
        if augment.image_contrast:
            picture = ImageEnhance.Contrast(picture).enhance(1.0 + contrast * augment.image_contrast)
        if augment.image_saturation:
            picture = ImageEnhance.Color(picture).enhance(1.0 + saturation * augment.image_saturation)
        if augment.image_hue:
            bands = list(picture.convert("HSV").split())
            bands[0] = Image.fromarray(np.asarray(bands[0]) + np.uint8(round(hue * augment.image_hue * 256) % 256))
            picture = Image.merge("HSV", bands).convert("RGB")
        return picture

    def wave(self, wave: np.ndarray) -> np.ndarray:
        """float32[n], louder or quieter, with other highs and lows, and white noise."""
        augment = self.augment
        gain, noise, *bands = self.random.random(2 + _NUM_OCTAVES).tolist()
        if augment.audio_gain_db:
            wave = wave * np.float32(10 ** (_signed(gain) * augment.audio_gain_db / 20))
        if augment.audio_equalizer_db:
            wave = _equalized(wave, [_signed(band) * augment.audio_equalizer_db for band in bands])
        if augment.audio_noise:
            level = noise * augment.audio_noise * float(np.sqrt(np.mean(np.square(wave), dtype=np.float64)))
            wave = wave + np.float32(level) * self.random.standard_normal(len(wave), dtype=np.float32)
        return wave

    def mel(self, mel_MF: np.ndarray, blank: float) -> np.ndarray:
        """float32[M, F] with stretches of frames and bands of frequencies set to `blank`.

        Source: SpecAugment, Park et al. 2019, section 2 (no warping).
        """
        augment = self.augment
        if not (augment.audio_mask_frames or augment.audio_mask_bands):
            return mel_MF
        num_mel, num_frames = mel_MF.shape
        masked = mel_MF.copy()
        for _ in range(augment.audio_masks):
            start, end = self._stretch(num_frames, augment.audio_mask_frames)
            masked[:, start:end] = blank
            start, end = self._stretch(num_mel, augment.audio_mask_bands)
            masked[start:end] = blank
        return masked

    def _stretch(self, size: int, longest: int) -> tuple[int, int]:
        """A random stretch of at most half of `size`."""
        width = int(self.random.integers(0, min(longest, size // 2) + 1))
        start = int(self.random.integers(0, size - width + 1))
        return start, start + width


def _shuffled_items(parts: Sequence[Part], random: np.random.Generator) -> Iterator[Part]:
    for type_, group in groupby(parts, key=lambda part: part.type):
        run = list(group)
        yield from (run[place] for place in random.permutation(len(run))) if type_ == "item" else run


@lru_cache(maxsize=64)
def _changes_nothing(augment: Augment) -> bool:
    return augment == Augment(audio_speeds=augment.audio_speeds)


def _signed(share: float) -> float:
    """A draw from [0, 1) as one from [-1, 1)."""
    return 2.0 * share - 1.0


def _equalized(wave: np.ndarray, gains_db: list[float]) -> np.ndarray:
    """A float32 wave whose frequencies are louder or quieter: gains at octaves up to half the rate, straight lines between them."""
    spectrum = np.fft.rfft(wave)
    shares = np.linspace(0.0, 1.0, len(spectrum))
    octaves = np.log2(np.maximum(shares, 2.0 ** (1 - len(gains_db)))) + len(gains_db) - 1
    gains = 10 ** (np.interp(octaves, np.arange(len(gains_db)), gains_db) / 20)
    return np.fft.irfft(spectrum * gains, n=len(wave)).astype(np.float32)


def _crop_box(size: tuple[int, int], augment: Augment, draws: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """A part of a picture of `size`, left, upper, right and lower, of another area and aspect ratio."""
    area, ratio, place_x, place_y = draws
    share = 1.0 - area * augment.image_crop
    stretch = (1.0 + augment.image_stretch) ** _signed(ratio)
    width = min(size[0], max(1, round(size[0] * math.sqrt(share * stretch))))
    height = min(size[1], max(1, round(size[1] * math.sqrt(share / stretch))))
    left, upper = int(place_x * (size[0] - width + 1)), int(place_y * (size[1] - height + 1))
    return left, upper, left + width, upper + height


def _moved(picture, shift: tuple[float, float], *, scale: float, turn: float):
    """A picture of the same size whose content is shifted by shares of its sides, scaled and turned by radians around its middle.

    Returns:
        The picture, and the `Affine` from the given one's pixel coordinates to its own.
    """
    from PIL import Image

    width, height = picture.size
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    from_x, from_y = width * (0.5 + shift[0]), height * (0.5 + shift[1])
    # Each place (x, y) of the result comes from (a x + b y + c, d x + e y + f).
    c, f = from_x - (cos * width - sin * height) / 2, from_y - (sin * width + cos * height) / 2
    corners = [(cos * x - sin * y + c, sin * x + cos * y + f) for x in (0, width) for y in (0, height)]
    xs, ys = zip(*corners, strict=True)
    # As much border as the corners reach over, and a pixel for the interpolation.
    left, right = (max(0, math.ceil(over)) + 1 for over in (-min(xs), max(xs) - width))
    upper, lower = (max(0, math.ceil(over)) + 1 for over in (-min(ys), max(ys) - height))
    continued = Image.fromarray(np.pad(np.asarray(picture), ((upper, lower), (left, right), (0, 0)), mode="edge"))
    result = continued.transform(
        (width, height), Image.Transform.AFFINE, (cos, -sin, c + left, sin, cos, f + upper), Image.Resampling.BILINEAR
    )
    return result, Affine(cos, -sin, c, sin, cos, f).inverse()
