"""What is asked, decoded, and the answer that is explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm.core.errors import ConfigError, DataError
from megamm.core.types import Message, Part
from megamm.data.media.files import MediaError, decode_picture, decode_sound, media_type
from megamm.data.samples.targets import check_question
from megamm.inference.load import Loaded
from megamm.inference.prompt import Prompt, make_prompt


@dataclass(frozen=True, slots=True)
class Question:
    """A question about files.

    Attributes:
        prompt: As the model takes it.
        text: What is asked.
        image_files: Pictures, which stand before everything.
        audio_files: Sounds, which stand before the text.
        pictures: uint8[H, W, 3] of each picture, upright, in source pixels.
        seconds: Duration of each sound.
    """

    prompt: Prompt
    text: str
    image_files: tuple[Path, ...]
    audio_files: tuple[Path, ...]
    pictures: tuple[np.ndarray, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is explained.

    Attributes:
        text: In words.
        token_ids: Without the token that ends it; empty where a head answers.
        label: Number of the head's label; None where tokens answer.
        is_given: It was asked about; the model may say the same or something else.
        is_finished: False where it is the model's own and was cut off.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    label: int | None = None
    is_given: bool = False
    is_finished: bool = True


def read_question(loaded: Loaded, text: str, *, images: Sequence[Path] = (), audios: Sequence[Path] = ()) -> Question:
    """Read and decode what is asked about.

    Args:
        loaded: The model that is asked.
        text: The question; it may be empty where there is a file.
        images: Picture files.
        audios: Sound files.

    Raises:
        ConfigError: Nothing is asked, or a file is missing or of another kind.
        DataError: A file cannot be decoded, the model has no tower for it, or its head looks at another number of files.
    """
    if not text and not images and not audios:
        raise ConfigError("nothing is asked; give --text, --image or --audio")
    contents = {"image": [_content(path, "image") for path in images], "audio": [_content(path, "audio") for path in audios]}
    named = [(kind, content) for kind in ("image", "audio") for content in contents[kind]]
    parts = [Part(kind, member=str(number)) for number, (kind, _) in enumerate(named)]
    messages = [Message("user", (*parts, *([Part("text", text=text)] if text else [])))]
    if loaded.model.head is not None:
        check_question(loaded.model.head.settings, messages)
    pictures = [_decoded(path, _picture, content, loaded) for path, content in zip(images, contents["image"], strict=True)]
    seconds = [_decoded(path, _seconds, content, loaded) for path, content in zip(audios, contents["audio"], strict=True)]
    prompt = make_prompt(loaded, messages, {str(number): content for number, (_, content) in enumerate(named)})
    return Question(prompt, text, tuple(images), tuple(audios), tuple(pictures), tuple(seconds))


def _content(path: Path, kind: str) -> bytes:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; name a file for --{kind}")
    if (found := media_type(path.name)) != kind:
        raise ConfigError(f"{path} is no {kind} file{f'; give it to --{found}' if found else ''}")
    return path.read_bytes()


def _decoded(path: Path, decode: Any, content: bytes, loaded: Loaded) -> Any:
    try:
        return decode(content, loaded)
    except MediaError as error:
        raise DataError(f"{path}: {error}") from None


def _picture(content: bytes, loaded: Loaded) -> np.ndarray:
    return np.asarray(decode_picture(content, loaded.media.limits))


def _seconds(content: bytes, loaded: Loaded) -> float:
    if loaded.media.audio is None:
        raise MediaError("this model has no tower for a sound; ask a model that has one")
    wave, rate_hz = decode_sound(content, loaded.media.audio, loaded.media.limits)
    return len(wave) / rate_hz
