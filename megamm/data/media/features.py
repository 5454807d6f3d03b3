"""How much of a row a picture or a sound takes, from its header's facts alone: the arithmetic that planning and decoding share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megamm.config import AudioFeatures, Data, Head, ImageFeatures, Limits, Model
from megamm.core.files import canonical_json, digest_text
from megamm.core.lengths import audio_num_mel_frames, audio_num_tokens, image_num_tokens, patch_grid
from megamm.core.types import MediaFacts
from megamm.data.media.files import DEFAULT_LIMITS, MediaError, check_pixels, check_sound


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one picture or sound takes: placeholder tokens, vision-tower patches, mel frames."""

    tokens: int
    patches: int = 0
    frames: int = 0


@dataclass(frozen=True, slots=True)
class MediaRules:
    """How media become tower inputs, and what is refused.

    Attributes:
        image: None where the model has no vision tower.
        audio: None where the model has no audio tower.
        limits: What is refused.
        outline_points: Corners of the outline that an instance of a mask is laid out with.
        head: What answers in place of tokens, so that samples are laid out without their answers; None where tokens answer.
    """

    image: ImageFeatures | None
    audio: AudioFeatures | None
    limits: Limits = DEFAULT_LIMITS
    outline_points: int = Data.outline_points
    head: Head | None = None

    @classmethod
    def of(cls, model: Model, data: Data) -> MediaRules:
        """The rules that a recipe states."""
        image, audio = model.image_features if model.vision else None, model.audio_features if model.audio else None
        return cls(image, audio, data.limits, data.outline_points, model.head)

    @property
    def fingerprint(self) -> str:
        """Digest of everything here that a planned length depends on."""
        return digest_text(canonical_json(dataclasses.asdict(self)))

    def footprint(self, facts: MediaFacts, speed: float = 1.0) -> Footprint:
        """What a picture or a sound takes.

        Args:
            facts: What its header says.
            speed: A sound is played so much faster; the limits hold for the sound itself.

        Raises:
            MediaError: It is beyond a limit, or the model has no tower for it.
        """
        if facts.type == "image":
            if self.image is None:
                raise MediaError("the model has no vision tower for a picture; set model.vision or leave the dataset out")
            check_pixels(facts.width, facts.height, self.limits)
            grid = image_grid(facts.width, facts.height, self.image)
            tokens = image_num_tokens(grid, self.image.merge)
            return Footprint(tokens, patches=grid[0] * grid[1] if self.image.kind == "naflex" else tokens)
        if self.audio is None:
            raise MediaError("the model has no audio tower for a sound; set model.audio or leave the dataset out")
        check_sound(facts.num_frames, facts.rate_hz, self.audio, self.limits)
        num_samples = resampled_length(facts.num_frames, played_rate(facts.rate_hz, speed), self.audio.rate_hz)
        frames = audio_num_mel_frames(num_samples, self.audio.hop_length, self.audio.min_samples)
        return Footprint(audio_num_tokens(frames), frames=frames)


def image_grid(width: int, height: int, features: ImageFeatures) -> tuple[int, int]:
    """Rows and columns of the tower's feature map for a picture of `width` x `height` pixels."""
    if features.kind == "fixed":
        return features.size // features.stride, features.size // features.stride
    return patch_grid(
        height,
        width,
        patch_size=features.patch_size,
        max_patches=features.max_patches,
        merge=features.merge,
        max_scale=features.max_scale,
    )


def played_rate(rate_hz: int, speed: float) -> int:
    """The rate that a sound of `rate_hz` is said to have, so that resampling plays it `speed` times as fast."""
    return round(rate_hz * speed)


def resampled_length(num_frames: int, rate_hz: int, target_hz: int) -> int:
    """Samples of a sound after resampling, rounded up so that no sound becomes empty."""
    return -(-num_frames * target_hz // rate_hz)
