"""The questions of a parity report: made, not read, so that an export needs no data beside the run."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import soundfile
from PIL import Image

from megamm.core.types import Message, Part
from megamm.models.configuration_megamm import MegaMMConfig

_TEXT = "What is this? 1 + 2 = three; say it again."


@dataclass(frozen=True)
class Probe:
    """One question, with its raw media for the exported processor and the same media encoded for ours.

    Attributes:
        name: Which modalities it has.
        message: The question; members are `0.png` and `0.wav`.
        picture: uint8[H, W, 3]; None without a picture.
        sound: float32[samples] at the model's rate; None without a sound.
        media: Member -> PNG, or WAV of floating-point samples: both keep every bit.
    """

    name: str
    message: Message
    picture: np.ndarray | None
    sound: np.ndarray | None
    media: dict[str, bytes]


def make_probes(config: MegaMMConfig) -> list[Probe]:
    """A question for each modality of the model, and one that mixes them; the same at every call."""
    text, image, audio = Part("text", text=_TEXT), Part("image", member="0.png"), Part("audio", member="0.wav")
    questions = {"text": (text,)}
    if config.vision_config is not None:
        questions["image"] = (image, text)
    if config.audio_config is not None:
        questions["audio"] = (audio, text)
    if config.vision_config is not None and config.audio_config is not None:
        questions["image_audio"] = (audio, image, text)
    return [_probe(name, parts, config.audio_features["rate_hz"]) for name, parts in questions.items()]


def _probe(name: str, parts: tuple[Part, ...], rate_hz: int) -> Probe:
    types = {part.type for part in parts}
    picture = _picture() if "image" in types else None
    sound = _sound(rate_hz) if "audio" in types else None
    media = {}
    if picture is not None:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        media["0.png"] = file.getvalue()
    if sound is not None:
        file = io.BytesIO()
        soundfile.write(file, sound, rate_hz, format="WAV", subtype="FLOAT")
        media["0.wav"] = file.getvalue()
    return Probe(name, Message("user", parts), picture, sound, media)


def _picture() -> np.ndarray:
    """Waves and noise, neither square nor a multiple of any patch."""
    rows, columns = np.mgrid[0:93, 0:140]
    waves = np.stack([np.sin(rows / 7), np.cos(columns / 11), np.sin((rows + columns) / 13)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return np.clip(127 + 90 * waves + noise, 0, 255).astype(np.uint8)


def _sound(rate_hz: int) -> np.ndarray:
    """A rising tone with noise, not a whole number of mel frames."""
    seconds = np.arange(int(1.3702 * rate_hz)) / rate_hz
    tone = 0.3 * np.sin(2 * np.pi * 330 * seconds * (1 + 0.2 * seconds))
    return (tone + np.random.default_rng(1).normal(0, 0.01, len(seconds))).astype(np.float32)
