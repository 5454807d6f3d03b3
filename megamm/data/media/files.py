"""Pictures and sounds as files: what their headers say, what is refused because of it, and their pixels and samples.

Limits are compared with what a header states before anything is allocated for what it states: a bomb costs no memory.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import numpy as np

from megamm.config import AudioFeatures, Limits
from megamm.core.errors import DataError
from megamm.core.types import MediaFacts

ReadAt = Callable[[int, int], bytes]
"""Bytes at an offset, as many as asked for unless the file ends."""
DEFAULT_LIMITS = Limits()
MIN_RATE_HZ = 1000
"""Below it a small file would become a long sound."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_AUDIO_FORMATS = frozenset({"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG"})
_EXIF_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})
# PIL.Image.Transpose of each EXIF orientation: what brings the stored pixels upright.
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_BLOCK_VALUES = 1 << 18
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_EXIF_BYTES = 1 << 20
_MAX_WAV_CHUNKS = 1000
_UNKNOWN_WAV_BYTES = 0x7FFFF000
"""What programs write that do not know the length yet is this or more."""


class MediaError(DataError):
    """A picture or a sound that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """How files of one kind are read.

    Attributes:
        type: `image` or `audio`.
        facts: What a file's header says.
        decode: Bytes to an upright RGB picture, or to a mono sound and its rate.
    """

    type: str
    facts: Callable[[BinaryIO], MediaFacts]
    decode: Callable[..., Any]


def media_type(suffix: str) -> str | None:
    """`image`, `audio` or None for a member suffix such as `0.jpg`."""
    decoder = DECODERS.get(suffix.rpartition(".")[2].lower())
    return None if decoder is None else decoder.type


def read_facts(type_: str, file: BinaryIO) -> MediaFacts:
    """Size of a picture or length of a sound from its header.

    Raises:
        MediaError: The header is not that of a supported format, or says that there is nothing in it.
    """
    return (PICTURE if type_ == "image" else SOUND).facts(file)


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Refuse pictures beyond the limit.

    Raises:
        MediaError: The picture has more pixels.
    """
    if width * height > limits.pixels:
        raise MediaError(f"the picture has {width} x {height} pixels, data.limits.pixels is {limits.pixels}")


def check_sound(num_frames: int, rate_hz: int, features: AudioFeatures, limits: Limits) -> None:
    """Refuse sounds beyond the limits, or of a rate that no recording has.

    Raises:
        MediaError: The sound is longer, or its rate lies outside of `MIN_RATE_HZ` and the limit.
    """
    if not MIN_RATE_HZ <= rate_hz <= limits.rate_hz:
        raise MediaError(f"the sound has a rate of {rate_hz} Hz, taken are {MIN_RATE_HZ} Hz to data.limits.rate_hz ({limits.rate_hz})")
    if num_frames > features.max_seconds * rate_hz:
        raise MediaError(f"the sound lasts {num_frames / rate_hz:.1f} s, model.audio_features.max_seconds is {features.max_seconds}")


def decode_picture(content: bytes, limits: Limits = DEFAULT_LIMITS):
    """A picture as `PIL.Image` in RGB, upright; transparency is laid on white, of an animation the first frame is taken.

    Raises:
        MediaError: Not a picture, damaged, or beyond the limit.
    """
    from PIL import Image

    with open_image(io.BytesIO(content)) as opened:
        check_pixels(opened.width, opened.height, limits)
        orientation = exif_orientation(opened)
        try:
            picture = _rgb(opened)
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise MediaError(f"the picture cannot be decoded ({_brief(error)})") from None
    return picture.transpose(Image.Transpose(_UPRIGHT[orientation])) if orientation in _UPRIGHT else picture


def decode_mask(content: bytes, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """A mask as int32[H, W], the value k where instance k is.

    Raises:
        MediaError: Not a PNG of one channel, damaged, or beyond the limit.
    """
    with open_image(io.BytesIO(content)) as opened:
        check_pixels(opened.width, opened.height, limits)
        if opened.format != "PNG" or opened.mode not in _MASK_MODES:
            raise MediaError(f"the mask is a {opened.format} of mode {opened.mode}; write a PNG of one channel, 8 or 16 bits, or a palette")
        try:
            return np.asarray(opened).astype(np.int32)
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            raise MediaError(f"the mask cannot be decoded ({_brief(error)})") from None


def decode_sound(content: bytes, features: AudioFeatures, limits: Limits = DEFAULT_LIMITS) -> tuple[np.ndarray, int]:
    """A sound as float32[n], its channels averaged, and its rate in hertz.

    Raises:
        MediaError: Not a sound, damaged, empty, not finite, or beyond the limits.
    """
    import soundfile

    with _open_sound(io.BytesIO(content)) as sound:
        num_frames, rate_hz = sound.frames, sound.samplerate
        check_sound(num_frames, rate_hz, features, limits)
        try:
            wave = _mono(sound)
        except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
            raise MediaError(f"the sound cannot be decoded ({_brief(error)})") from None
    if len(wave) != num_frames:
        raise MediaError(f"the sound has {len(wave)} samples, its header says {num_frames}")
    if not np.isfinite(wave).all():
        raise MediaError("the sound holds samples that are not finite numbers")
    return wave, rate_hz


def open_image(file: BinaryIO, *, header_only: bool = False):
    """Open a picture lazily: `size` and `info` are there, pixels are not.

    Args:
        file: At its beginning.
        header_only: Read no further than the pixels, which then cannot be loaded.

    Raises:
        MediaError: Not a supported format.
    """
    from PIL import Image, UnidentifiedImageError

    _silence_bombs()
    is_png = file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
    file.seek(0)
    try:
        return Image.open(_plain_png(file, header_only) if is_png else file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        # Its words name the object that was read, not the file.
        raise MediaError("the picture's header cannot be read (no JPEG, PNG or WebP file, or a damaged one)") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, struct.error) as error:
        raise MediaError(f"the picture's header cannot be read ({_brief(error)})") from None


@cache
def _silence_bombs() -> None:
    """Take away Pillow's own warning of large pictures: `data.limits` decides which are too large."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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


def _picture_facts(file: BinaryIO) -> MediaFacts:
    with open_image(file, header_only=True) as image:
        width, height = image.size
        if exif_orientation(image) in _TURNED:
            width, height = height, width
    return MediaFacts("image", width=width, height=height)


def _sound_facts(file: BinaryIO) -> MediaFacts:
    with _open_sound(file) as sound:
        return MediaFacts("audio", num_frames=sound.frames, rate_hz=sound.samplerate)


def _plain_png(file: BinaryIO, header_only: bool) -> BinaryIO:
    """A PNG without compressed texts and colour profiles, of which Pillow would unpack up to 64 MiB and nothing here uses any."""
    position = len(_PNG_SIGNATURE)
    kept, is_whole = [(0, position)], True
    file.seek(position)
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if header_only and kind == b"IDAT":
            # Pillow looks no further than where the pixels begin.
            kept.append((position, 8))
            break
        if _is_needed(kind, size, file, header_only):
            kept.append((position, size + 12))
        else:
            is_whole = False
        position += size + 12
        file.seek(position)
    if is_whole and not header_only:
        file.seek(0)
        return file
    content = io.BytesIO()
    for start, size in kept:
        file.seek(start)
        content.write(file.read(size))
    content.seek(0)
    return content


def _is_needed(kind: bytes, size: int, file: BinaryIO, header_only: bool) -> bool:
    if header_only:
        return kind in (b"IHDR", b"eXIf") and size <= _MAX_EXIF_BYTES
    if kind == b"iTXt":
        # A keyword of at most 79 bytes, zero, and whether the text is compressed.
        _, _, rest = file.read(min(size, 81)).partition(b"\0")
        return rest[:1] == b"\0"
    return kind not in (b"zTXt", b"iCCP")


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


def _check_whole_wav(file: BinaryIO) -> None:
    """Refuse a WAV that is cut: libsndfile takes what is left of it for the whole sound."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) == b"RIFF":
        file.seek(12)
        for _ in range(_MAX_WAV_CHUNKS):
            if len(head := file.read(8)) < 8:
                break
            kind, size = struct.unpack("<4sI", head)
            if kind == b"data":
                if end - file.tell() < size < _UNKNOWN_WAV_BYTES:
                    raise MediaError(f"the sound is cut: {end - file.tell()} of its {size} bytes of samples are there")
                break
            file.seek(size + size % 2, os.SEEK_CUR)
    file.seek(0)


def _open_sound(file: BinaryIO):
    import soundfile

    _check_whole_wav(file)
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise MediaError(f"the sound's header cannot be read ({_brief(error)})") from None
    if sound.format not in _AUDIO_FORMATS:
        raise MediaError(f"sound format {sound.format} is not supported; use WAV, FLAC, OGG or MP3")
    if not 0 < sound.frames < 1 << 40 or sound.samplerate <= 0:
        raise MediaError(f"the sound has {sound.frames} samples at {sound.samplerate} Hz")
    return sound


def _mono(sound) -> np.ndarray:
    """All samples of an opened sound, its channels averaged block by block: a thousand channels take the memory of one."""
    if sound.channels == 1:
        return sound.read(sound.frames, dtype="float32")
    blocks = sound.blocks(max(1, _BLOCK_VALUES // sound.channels), dtype="float32", always_2d=True)
    # Channel by channel: a mean over an axis as short as two takes four times as long.
    return np.concatenate([sum(block.T[1:], start=block.T[0]) / np.float32(sound.channels) for block in blocks])


def _brief(error: BaseException) -> str:
    # libsndfile's own words, without the object that soundfile puts before them.
    words = str(getattr(error, "error_string", error))
    return " ".join(words.split())[:120] or type(error).__name__


PICTURE = Decoder("image", _picture_facts, decode_picture)
SOUND = Decoder("audio", _sound_facts, decode_sound)
DECODERS: dict[str, Decoder] = {
    "jpg": PICTURE,
    "jpeg": PICTURE,
    "png": PICTURE,
    "webp": PICTURE,
    "wav": SOUND,
    "flac": SOUND,
    "ogg": SOUND,
    "opus": SOUND,
    "mp3": SOUND,
}
"""Ending of a member -> how it is read. A file is what its bytes say: a PNG named `.jpg` is taken."""
IMAGE_ENDINGS = frozenset(ending for ending, decoder in DECODERS.items() if decoder is PICTURE)
AUDIO_ENDINGS = frozenset(ending for ending, decoder in DECODERS.items() if decoder is SOUND)


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
