"""A shard small enough to damage every bit of, and the tar writer that lets one write what no writer would."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.faults.case import Files

BLOCK = 512
ANSWER = "a small answer"


def document(text: str) -> bytes:
    """`KEY.json` of a plain text."""
    return _json({"task": "text", "messages": [{"role": "assistant", "content": [{"type": "text", "text": text}]}]})


def chat(type_: str, member: str) -> bytes:
    """`KEY.json` of a picture or a sound and its answer."""
    question = [{"type": type_, "member": member}]
    answer = [{"type": "text", "text": ANSWER}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _json({"task": "captioning", "messages": messages})


def media_sample(suffix: str, content: bytes) -> dict[str, bytes]:
    """A sample that asks about one picture or sound."""
    from megamm.data.media.files import media_type

    return {"json": chat(media_type(suffix) or "image", suffix), suffix: content}


def picture(width: int = 16, height: int = 12, *, format: str = "JPEG", seed: int = 0, **options: Any) -> bytes:
    """Noise as a picture file."""
    from PIL import Image

    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), format, **options)


def encoded(image: Any, format: str, **options: Any) -> bytes:
    """A Pillow image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def sound(num_frames: int = 800, *, rate_hz: int = 16000, format: str = "FLAC", subtype: str | None = None, seed: int = 0) -> bytes:
    """Noise as a sound file."""
    values = np.random.default_rng(seed).uniform(-0.5, 0.5, num_frames).astype(np.float32)
    return recorded(values, rate_hz, format=format, subtype=subtype)


def recorded(values: np.ndarray, rate_hz: int, *, format: str = "FLAC", subtype: str | None = None) -> bytes:
    """Samples as a sound file."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, values, rate_hz, format=format, subtype=subtype)
    return file.getvalue()


@lru_cache(maxsize=1)
def healthy() -> dict[str, dict[str, bytes]]:
    """Four samples: text, picture, sound, text."""
    return {
        "t0": {"json": document("the first text")},
        "p0": media_sample("0.jpg", picture(quality=20)),
        "s0": media_sample("0.flac", sound(200)),
        "t1": {"json": document("the last text")},
    }


def beside(samples: Mapping[str, Files]) -> dict[str, Files]:
    """Samples between two healthy texts, which no fault of theirs may cost."""
    return {"t0": healthy()["t0"], **samples, "t1": healthy()["t1"]}


def pack(samples: Mapping[str, Files], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A shard of samples as WebDataset's writer would make it."""
    return archive(((f"{key}.{suffix}", content) for key, files in samples.items() for suffix, content in files.items()), format=format)


def archive(entries: Iterable[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of any names and contents."""
    return ending(b"".join(entry(name, content, format=format) for name, content in entries))


def entry(name: str, content: bytes, *, format: int = tarfile.USTAR_FORMAT, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """Header and bytes of one member."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info.tobuf(format, "utf-8", "surrogateescape") + padded(content)


def padded(content: bytes) -> bytes:
    """`content` up to a whole number of blocks."""
    return content + bytes(-len(content) % BLOCK)


def ending(entries: bytes) -> bytes:
    """Entries and the two zero blocks after them."""
    return entries + bytes(2 * BLOCK)


def headers(content: bytes) -> list[int]:
    """Offsets of all headers of a healthy tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar.getmembers()]


def payloads(content: bytes) -> dict[str, tuple[int, int]]:
    """Member name -> offset and size of its bytes."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar.getmembers()}


def signed(header: bytes) -> bytes:
    """A tar header with the checksum that it should have."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def flipped(content: bytes, bit: int) -> bytes:
    """`content` with one bit flipped."""
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
