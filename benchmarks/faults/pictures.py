"""Pictures that are odd, and pictures that are traps."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import beside, encoded, media_sample, pack, picture

BOMB_BYTES = 256 << 20
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def odd_pictures(canary: Path) -> Iterator[Case]:
    """Pictures that must be delivered: one pixel, one line, every mode, damaged EXIF that does not touch the pixels."""
    from PIL import Image

    for format, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        for width, height in ((1, 1), (1, 300), (300, 1)):
            yield _fine(f"{width} x {height} {format}", f"0.{ending}", picture(width, height, format=format))
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "I;16", "CMYK"):
        source = Image.fromarray(values, "RGBA")
        image = (
            Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
            if mode == "I;16"
            else source.convert("RGB").convert(mode)
            if mode in ("1", "CMYK")
            else source.convert(mode)
        )
        format, ending = ("JPEG", "jpg") if mode == "CMYK" else ("PNG", "png")
        if mode != "PA":
            yield _fine(f"mode {mode}", f"0.{ending}", encoded(image, format))
    for name, exif in exif_damage().items():
        yield _fine(f"EXIF: {name}", "0.jpg", _with_exif(picture(quality=20), exif))
    frames = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in range(0, 250, 10)]
    for format, ending in (("WEBP", "webp"), ("PNG", "png")):
        yield _fine(f"animated {format}", f"0.{ending}", encoded(frames[0], format, save_all=True, append_images=frames[1:]))


def broken_pictures(canary: Path) -> Iterator[Case]:
    """Pictures that nobody can use: cut, of another kind, without pixels, larger than the limit by what they state."""
    whole = {"jpg": picture(quality=90), "png": picture(format="PNG"), "webp": picture(format="WEBP")}
    for ending, content in whole.items():
        for share in (0, 1, 8, 12, 40):
            yield _rotten(f"{ending} cut after {len(content) * share // 100} bytes", f"0.{ending}", content[: len(content) * share // 100])
        yield _rotten(f"zeros as {ending}", f"0.{ending}", bytes(2000))
        yield _rotten(f"text as {ending}", f"0.{ending}", b"GIF89a, perhaps" * 50)
    yield _rotten("SVG as png", "0.png", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')
    yield _rotten("GIF as png", "0.png", picture(format="GIF"))
    yield _rotten("PostScript as jpg", "0.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(touch canary) system\n")
    for width, height in ((0, 5), (5, 0), (60_000, 60_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0xFFFFFFFF, 0xFFFFFFFF)):
        yield _rotten(f"PNG that states {width} x {height}", "0.png", _png(width, height, zlib.compress(bytes(100))))
    yield _rotten("JPEG that states 65500 x 65500", "0.jpg", _jpeg_of_size(whole["jpg"], 65_500, 65_500))
    yield _rotten("JPEG that states 0 x 12", "0.jpg", _jpeg_of_size(whole["jpg"], 0, 12))
    yield _rotten("WebP canvas of 16384 x 16384", "0.webp", _webp_canvas(16_384, 16_384))
    yield _rotten("WebP canvas of 16777216 x 16777216", "0.webp", _webp_canvas(1 << 24, 1 << 24))


def picture_bombs(canary: Path) -> Iterator[Case]:
    """Small files that grow: pixels, compressed text and colour profiles, EXIF, endless animations."""
    side = 20_000
    yield _rotten(f"PNG of {side} x {side} zeros", "0.png", _png(side, side, _zeros(side * (side // 8 + 1)), depth=1))
    wide = 30_000
    yield _rotten(f"PNG of {wide} x {wide // 10} zeros, interlaced", "0.png", _png(wide, wide, _zeros(1 << 20), interlaced=True))
    squeezed, half = _zeros(BOMB_BYTES), _zeros(1 << 19)
    small = zlib.compress(b"".join(b"\0" + bytes(8 * 3) for _ in range(8)))
    for name, chunk in {
        "zTXt": _chunk(b"zTXt", b"note\0\0" + squeezed),
        "iTXt": _chunk(b"iTXt", b"note\0\x01\0\0\0" + squeezed),
        "iCCP": _chunk(b"iCCP", b"profile\0\0" + squeezed),
        "a thousand zTXt": b"".join(_chunk(b"zTXt", b"note%d\0\0" % number + half) for number in range(1000)),
    }.items():
        yield _loose(f"{name} before the pixels", "0.png", _png(8, 8, small, before=chunk))
        yield _loose(f"{name} after the pixels", "0.png", _png(8, 8, small, after=chunk))
    yield _loose("pixels of 256 MiB behind a small size", "0.png", _png(8, 8, squeezed))
    exif = exif_damage()
    yield _loose("eXIf of 16 MB", "0.png", _png(8, 8, small, before=_chunk(b"eXIf", exif["entries without end"] * 180)))
    segments = b"".join(b"\xff\xe2" + struct.pack(">H", 65_535) + b"ICC_PROFILE\0" + bytes([1, 255]) + bytes(65_519) for _ in range(255))
    content = picture(quality=20)
    yield _loose("JPEG with 16 MB of colour profile", "0.jpg", content[:2] + segments + content[2:])
    yield _loose("JPEG with a million comments", "0.jpg", content[:2] + b"\xff\xfe\0\2" * 1_000_000 + content[2:])
    yield _loose("WebP with 500 frames", "0.webp", _long_animation(500))


def exif_damage() -> dict[str, bytes]:
    """EXIF blocks that readers have fallen over."""

    def block(entries: bytes, count: int, rest: bytes = bytes(4)) -> bytes:
        return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + rest

    def tag(number: int, type_: int, count: int, value: int) -> bytes:
        return struct.pack("<HHII", number, type_, count, value)

    return {
        "empty": b"",
        "cut": b"II*\0\x08\0\0\0\x01\0",
        "noise": bytes(range(256)) * 8,
        "orientation 9": block(tag(0x0112, 3, 1, 9), 1),
        "orientation as text": block(tag(0x0112, 2, 4, 0x41414141), 1),
        "orientation of 2^31 values": block(tag(0x0112, 3, 1 << 31, 8), 1),
        "orientation of unknown type": block(tag(0x0112, 77, 1, 6), 1),
        "orientation as a fraction by zero": block(tag(0x0112, 5, 1, 26), 1, struct.pack("<III", 0, 1, 0)),
        "an IFD that leads to itself": block(tag(0x8769, 4, 1, 8) + tag(0xA005, 4, 1, 8), 2, struct.pack("<I", 8)),
        "entries without end": block(b"".join(tag(0x9000 + number % 512, 7, 4, number) for number in range(5000)), 65_535),
        "a field of 4 GB": block(tag(0x927C, 7, 0xFFFFFFFF, 8), 1),
    }


def _fine(name: str, suffix: str, content: bytes) -> Case:
    samples = beside({"p": media_sample(suffix, content)})
    return Case(name, pack(samples), samples)


def _rotten(name: str, suffix: str, content: bytes) -> Case:
    samples = beside({"p": media_sample(suffix, content)})
    return Case(name, pack(samples), samples, rotten=frozenset({"p"}))


def _loose(name: str, suffix: str, content: bytes) -> Case:
    samples = beside({"p": media_sample(suffix, content)})
    return Case(name, pack(samples), samples, loose=frozenset({"p"}))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(
    width: int, height: int, pixels: bytes, *, depth: int = 8, interlaced: bool = False, before: bytes = b"", after: bytes = b""
) -> bytes:
    color = 0 if depth == 1 else 2
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, int(interlaced)))
    return _SIGNATURE + header + before + _chunk(b"IDAT", pixels) + after + _chunk(b"IEND", b"")


def _zeros(num_bytes: int) -> bytes:
    """`num_bytes` zeros, compressed without ever holding them."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [packer.compress(block[: min(len(block), num_bytes - start)]) for start in range(0, num_bytes, len(block))]
    return b"".join([*parts, packer.flush()])


def _with_exif(jpeg: bytes, exif: bytes) -> bytes:
    body = b"Exif\0\0" + exif[:65_000]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def _jpeg_of_size(jpeg: bytes, width: int, height: int) -> bytes:
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def _webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP whose canvas is much larger than its only frame."""
    frame = picture(8, 8, format="WEBP", lossless=True)[12:]
    canvas = bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    place = bytes(6) + (7).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0"
    chunks = [(b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", place + frame)]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _long_animation(num_frames: int) -> bytes:
    from PIL import Image

    frames = [Image.fromarray(np.full((64, 64, 3), number % 256, np.uint8)) for number in range(num_frames)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True, method=0)
