"""What the header of a picture or a sound says, without decoding it: a bomb costs no memory here."""

from __future__ import annotations

import io
import os
import struct
from typing import BinaryIO

from megamm.core.errors import DataError
from megamm.core.types import MediaFacts
from megamm.data.tar import ReadAt

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "png", "webp"})
AUDIO_ENDINGS = frozenset({"wav", "flac", "ogg", "opus", "mp3"})
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_AUDIO_FORMATS = frozenset({"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG"})
_EXIF_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})


class MediaError(DataError):
    """A picture or a sound that cannot be used, and why."""


def media_type(suffix: str) -> str | None:
    """`image`, `audio` or None for a member suffix such as `0.jpg`."""
    ending = suffix.rpartition(".")[2].lower()
    if ending in IMAGE_ENDINGS:
        return "image"
    return "audio" if ending in AUDIO_ENDINGS else None


def read_facts(type_: str, file: BinaryIO) -> MediaFacts:
    """Size of a picture or length of a sound from its header.

    Raises:
        MediaError: The header is not that of a supported format, or says that there is nothing in it.
    """
    return _image_facts(file) if type_ == "image" else _audio_facts(file)


def open_image(file: BinaryIO):
    """Open a picture lazily: `size` and `info` are there, pixels are not.

    Raises:
        MediaError: Not a supported format.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=IMAGE_FORMATS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, struct.error) as error:
        raise MediaError(f"the picture's header cannot be read ({_brief(error)})") from None


def exif_orientation(image) -> int:
    """The EXIF orientation (1 to 8) of a picture opened by `open_image`; call it before the pixels are loaded.

    A PNG may carry EXIF after its pixels, where Pillow would decode the picture to find it: only what stands before counts.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        # Damaged EXIF does not make a picture unusable; viewers show it as stored.
        return 1
    return orientation if orientation in range(1, 9) else 1


def _image_facts(file: BinaryIO) -> MediaFacts:
    with open_image(file) as image:
        width, height = image.size
        if exif_orientation(image) in _TURNED:
            width, height = height, width
    return MediaFacts("image", width=width, height=height)


def _audio_facts(file: BinaryIO) -> MediaFacts:
    import soundfile

    try:
        info = soundfile.info(file)
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError) as error:
        raise MediaError(f"the sound's header cannot be read ({_brief(error)})") from None
    if info.format not in _AUDIO_FORMATS:
        raise MediaError(f"sound format {info.format} is not supported; use WAV, FLAC, OGG or MP3")
    if not 0 < info.frames < 1 << 40 or info.samplerate <= 0:
        raise MediaError(f"the sound has {info.frames} samples at {info.samplerate} Hz")
    return MediaFacts("audio", num_frames=info.frames, rate_hz=info.samplerate)


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


class FileRange(io.RawIOBase):
    """A stretch of a file as a file of its own, read by position so that what reads it can be shared."""

    def __init__(self, read: ReadAt, offset: int, size: int) -> None:
        super().__init__()
        self._read_at, self._offset, self._size = read, offset, size
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position of the stretch."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer) -> int:
        """Fill `buffer` from the current position, never beyond the stretch."""
        wanted = max(0, min(len(buffer), self._size - self._position))
        content = self._read_at(self._offset + self._position, wanted)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
