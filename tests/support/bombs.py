"""Small files that claim, or unpack to, enormous things."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from tests.support.shards import chat

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A valid PNG of one colour, tiny on disk; `extra` chunks stand before its pixels."""
    compressor = zlib.compressobj(9)
    line = bytes((width + 7) // 8 + 1)
    pixels = b"".join(compressor.compress(line) for _ in range(height)) + compressor.flush()
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return _SIGNATURE + header + b"".join(_chunk(*one) for one in extra) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def png_texts() -> bytes:
    """A PNG whose texts and profile unpack to a hundred megabytes, each just below what Pillow takes of one."""
    packed = zlib.compress(bytes(1 << 20), 9)
    texts = [(b"zTXt", b"key%d\0\0" % number + packed) for number in range(50)]
    texts += [(b"iTXt", b"other%d\0\1\0\0\0" % number + packed) for number in range(50)]
    return png(8, 8, *texts, (b"iCCP", b"icc\0\0" + zlib.compress(bytes(64 << 20), 9)))


def webp(width: int, height: int) -> bytes:
    """A WebP header (lossless) of that size, with next to nothing behind it."""
    bits = (width - 1) | (height - 1) << 14
    body = b"\x2f" + struct.pack("<I", bits) + bytes(64)
    chunk = b"VP8L" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header was changed to state that size."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def wav(num_frames: int, rate_hz: int, channels: int, *, stated_bytes: int | None = None) -> bytes:
    """16-bit silence whose header states `stated_bytes`."""
    data = bytes(2 * num_frames * channels)
    stated = len(data) if stated_bytes is None else stated_bytes
    form = struct.pack("<HHIIHH", 1, channels, rate_hz, (rate_hz * channels * 2) & 0xFFFFFFFF, channels * 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", min(stated + 36, 0xFFFFFFFF))
        + b"WAVEfmt \x10\0\0\0"
        + form
        + b"data"
        + struct.pack("<I", stated)
        + data
    )


def flac_states(num_frames: int, rate_hz: int) -> bytes:
    """A FLAC whose header was changed to state that length and rate."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((100, 2), np.float32), 16000, format="FLAC")
    content = bytearray(file.getvalue())
    # STREAMINFO at byte 18: 20 bits of rate, 3 of channels - 1, 5 of bits - 1, 36 of samples.
    fields = int.from_bytes(content[18:26], "big") & ((0xFF) << 36)
    content[18:26] = (rate_hz << 44 | fields | num_frames).to_bytes(8, "big")
    return bytes(content)


def flac_silence(seconds: int) -> bytes:
    """Real silence, which FLAC stores in next to nothing."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((seconds * 16000, 2), np.int16), 16000, format="FLAC")
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """Member suffix -> a picture that must be refused."""
    return {
        "many.png": png(9000, 9000),
        "more.png": png(30_000, 6_000),
        "wide.webp": webp(16_383, 10_000),
        "vast.webp": webp(16_384, 16_384),
        "vast.jpg": jpeg(65_000, 65_000),
    }


def sounds() -> dict[str, bytes]:
    """Member suffix -> a sound that must be refused."""
    return {
        "fast.wav": wav(100_000, 0x7FFFFFFF, 1),
        "slow.wav": wav(29, 1, 1),
        "states.flac": flac_states((1 << 36) - 1, 655_350),
        "long.flac": flac_silence(1800),
    }


def documents() -> dict[str, bytes]:
    """Name -> `KEY.json` that must be refused."""
    turn: Mapping[str, Any] = {"role": "user", "content": "x"}
    deep = b'{"task":"text","messages":' + b"[" * 90_000 + b"]" * 90_000 + b"}"
    return {
        "large": json.dumps(chat([{"type": "text", "text": "x" * (100 << 20)}], "y")).encode(),
        "deep": deep,
        "lists": b'{"task":"text","messages":[' + b"[]," * 1_000_000 + b"[]]}",
        "strings": b'{"task":"text","messages":[' + b'"",' * 1_000_000 + b'""]}',
        "open": b'{"a":"' + b'\\"[' * 1_000_000,
        "messages": json.dumps({"task": "chat", "messages": [turn] * 20_000}).encode(),
        "parts": json.dumps(chat([{"type": "text", "text": "x"}] * 50_000, "y")).encode(),
        "surrogate": json.dumps(chat([{"type": "text", "text": "\ud800"}], "y")).encode(),
    }
