"""What is done to pictures and sounds to see how far answers depend on clean ones.

Changes are made to the decoded source, before features: a microphone's hiss or a camera's blur come before anything that the model does. No
change of a picture moves a pixel, so boxes and masks stay where they are. What is drawn depends on the sample's key, the member and the
kind of change alone: the same at every strength, for any number of ranks and after a restart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from megamm.core.errors import ConfigError, DataError
from megamm.core.names import did_you_mean
from megamm.core.types import Sample
from megamm.data.media.features import MediaRules
from megamm.data.media.files import decode_picture, decode_sound
from megamm.evaluation.held_out import Place, skipped
from megamm.evaluation.records import SkippedSample

_MAX_PIXEL = 255.0


@dataclass(frozen=True, slots=True)
class Change:
    """One kind of change.

    Attributes:
        name: Begins with what it changes: `image_` or `audio_`.
        strengths: How strong it is made, one after the other.
        unit: Of a strength, in words.
        apply: Changed content of a member: of the medium, at a strength, with a generator of its own. A picture is a `PIL.Image` in RGB and
            a sound float32[n] with its rate in hertz; both come back as bytes of a file.
    """

    name: str
    strengths: tuple[float, ...]
    unit: str
    apply: Callable[[Any, float, np.random.Generator], bytes]

    @property
    def medium(self) -> str:
        """`image` or `audio`."""
        return self.name.partition("_")[0]

    def named(self, strength: float) -> str:
        """What a place and its result carry, such as `image_blur=0.02`."""
        return f"{self.name}={strength:g}"


def select_changes(names: Sequence[str]) -> tuple[Change, ...]:
    """The changes of some names, each once, in the order of `CHANGES`; `noise` means that of pictures and that of sounds.

    Raises:
        ConfigError: A name is unknown.
    """
    known = {word for change in CHANGES for word in _names(change)}
    for name in names:
        if name not in known:
            names_known = ", ".join(one.name for one in CHANGES)
            raise ConfigError(f"change {name!r} is not known; the changes are {names_known}{did_you_mean(name, sorted(known))}")
    return tuple(change for change in CHANGES if _names(change) & set(names))


def places_of(change: Change, places: Iterable[Place]) -> list[Place]:
    """The same places at every strength of a change, strength by strength."""
    kept = list(places)
    return [replace(place, change=change.named(strength)) for strength in change.strengths for place in kept]


def changed(samples: Iterable[tuple[Place, Sample | SkippedSample]], rules: MediaRules) -> Iterator[tuple[Place, Sample | SkippedSample]]:
    """Samples as their places say: with changed media, or as they are.

    Args:
        samples: From `read_samples`.
        rules: How the model hears sounds, and what is refused.
    """
    known = {change.named(strength): (change, strength) for change in CHANGES for strength in change.strengths}
    for place, sample in samples:
        if not place.change or isinstance(sample, SkippedSample):
            yield place, sample
            continue
        change, strength = known[place.change]
        try:
            yield place, replace(sample, media=_media(sample, change, strength, rules))
        except DataError as error:
            yield place, skipped(place, sample.key, error)


def _names(change: Change) -> set[str]:
    return {change.name, change.name.partition("_")[2]}


def _media(sample: Sample, change: Change, strength: float, rules: MediaRules) -> Mapping[str, bytes]:
    """The members of a sample, those changed that its messages show as the change's medium (so no mask is)."""
    shown = {part.member for message in sample.messages for part in message.content if part.type == change.medium}
    return {
        member: _content(content, change, strength, rules, seed=f"{change.name}/{sample.key}/{member}") if member in shown else content
        for member, content in sample.media.items()
    }


def _content(content: bytes, change: Change, strength: float, rules: MediaRules, *, seed: str) -> bytes:
    random = np.random.default_rng(xxhash.xxh3_64_intdigest(seed.encode()))
    if change.medium == "image":
        return change.apply(decode_picture(content, rules.limits), strength, random)
    if rules.audio is None:
        raise DataError("the sample holds a sound, but this model has no tower for it; ask a model that has one")
    return change.apply(decode_sound(content, rules.audio, rules.limits), strength, random)


def _image_noise(picture: Any, strength: float, random: np.random.Generator) -> bytes:
    from PIL import Image

    values = np.asarray(picture, dtype=np.float32)
    noisy = values + np.float32(strength * _MAX_PIXEL) * random.standard_normal(values.shape, dtype=np.float32)
    return _file(Image.fromarray(noisy.round().clip(0, _MAX_PIXEL).astype(np.uint8)), "PNG", compress_level=1)


def _image_blur(picture: Any, strength: float, random: np.random.Generator) -> bytes:
    from PIL import ImageFilter

    return _file(picture.filter(ImageFilter.GaussianBlur(strength * min(picture.size))), "PNG", compress_level=1)


def _image_jpeg(picture: Any, strength: float, random: np.random.Generator) -> bytes:
    return _file(picture, "JPEG", quality=int(strength))


def _audio_noise(sound: tuple[np.ndarray, int], strength: float, random: np.random.Generator) -> bytes:
    wave, rate_hz = sound
    level = float(np.sqrt(np.mean(np.square(wave), dtype=np.float64))) * 10 ** (-strength / 20)
    return _wav(wave + np.float32(level) * random.standard_normal(len(wave), dtype=np.float32), rate_hz)


def _audio_speed(sound: tuple[np.ndarray, int], strength: float, random: np.random.Generator) -> bytes:
    # The same samples at another rate: features play them so much faster, pitch included.
    wave, rate_hz = sound
    return _wav(wave, round(rate_hz * strength))


def _audio_gain(sound: tuple[np.ndarray, int], strength: float, random: np.random.Generator) -> bytes:
    wave, rate_hz = sound
    # Too loud a recording is cut at full scale.
    return _wav((wave * np.float32(10 ** (strength / 20))).clip(-1.0, 1.0), rate_hz)


def _file(picture: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _wav(wave: np.ndarray, rate_hz: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, format="WAV", subtype="FLOAT")
    return file.getvalue()


CHANGES: tuple[Change, ...] = (
    Change("image_noise", (0.05, 0.1, 0.2), "standard deviation, share of the brightest value", _image_noise),
    Change("image_blur", (0.01, 0.02, 0.04), "standard deviation, share of the shorter side", _image_blur),
    Change("image_jpeg", (50.0, 20.0, 5.0), "quality", _image_jpeg),
    Change("audio_noise", (20.0, 10.0, 0.0), "dB of signal over noise", _audio_noise),
    Change("audio_speed", (0.8, 0.9, 1.1, 1.25), "times as fast, pitch included", _audio_speed),
    Change("audio_gain", (-20.0, -10.0, 10.0), "dB", _audio_gain),
)
"""All kinds of change, weak strengths first where one direction is weaker."""
