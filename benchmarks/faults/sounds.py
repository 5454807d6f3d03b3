"""Sounds that are odd, and sounds that are traps."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import beside, media_sample, pack, recorded, sound


def odd_sounds(canary: Path) -> Iterator[Case]:
    """Sounds that must be delivered: short, stereo, any rate, WAV with odd chunks, MP3 without its information frame."""
    for num_frames in (1, 2, 159, 160, 161):
        yield _fine(f"{num_frames} samples", "0.flac", sound(num_frames))
    for rate_hz in (8000, 11025, 44100, 48000, 96000):
        for format, ending in (("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg")):
            yield _fine(f"{format} at {rate_hz} Hz", f"0.{ending}", sound(rate_hz // 10, rate_hz=rate_hz, format=format))
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (500, 2)).astype(np.float32)
    for format, ending in (("WAV", "wav"), ("FLAC", "flac")):
        yield _fine(f"stereo {format}", f"0.{ending}", recorded(stereo, 16000, format=format))
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"):
        yield _fine(f"WAV of {subtype}", "0.wav", sound(300, format="WAV", subtype=subtype))
    wav = sound(300, format="WAV")
    yield _fine("WAV with an odd chunk before the samples", "0.wav", wav[:12] + b"note" + struct.pack("<I", 3) + b"abc\0" + wav[12:])
    yield _fine("WAV with chunks after the samples", "0.wav", wav + b"LIST" + struct.pack("<I", 5) + b"INFOx\0")
    yield _fine("WAV with a wrong RIFF size", "0.wav", wav[:4] + b"\xff\xff\xff\xff" + wav[8:])
    for rate_hz in (16000, 44100):
        yield _fine(f"MP3 at {rate_hz} Hz", "0.mp3", sound(rate_hz, rate_hz=rate_hz, format="MP3"))
        yield _fine(
            f"MP3 at {rate_hz} Hz without information frame", "0.mp3", _without_first_frame(sound(rate_hz, rate_hz=rate_hz, format="MP3"))
        )


def useless_sounds(canary: Path) -> Iterator[Case]:
    """Sounds that must not reach a model: empty, not finite, cut, of another kind, too long."""
    for format, ending in (("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg")):
        yield _rotten(f"empty {format}", f"0.{ending}", recorded(np.zeros(0, np.float32), 16000, format=format))
        content = sound(4000, format=format)
        for share in (0, 1, 10):
            yield _rotten(f"{format} cut after {len(content) * share // 100} bytes", f"0.{ending}", content[: len(content) * share // 100])
        yield _rotten(f"zeros as {ending}", f"0.{ending}", bytes(3000))
        yield _rotten(f"text as {ending}", f"0.{ending}", b"RIFF, perhaps" * 50)
    for name, value in (("NaN", np.nan), ("infinity", np.inf), ("-infinity", -np.inf)):
        for place in (0, 299):
            values = np.zeros(300, np.float32)
            values[place] = value
            yield _rotten(f"{name} at sample {place}", "0.wav", recorded(values, 16000, format="WAV", subtype="FLOAT"))
    yield _rotten("31 s", "0.flac", recorded(np.zeros(31 * 8000, np.float32), 8000))
    yield _rotten("RAW as wav", "0.wav", sound(300, format="AIFF"))


def stated_sounds(canary: Path) -> Iterator[Case]:
    """Headers that state another rate, length or number of channels than there is: used as they stand, or reported."""
    wav = sound(300, format="WAV")
    for rate_hz in (0, 1, 7, 100, 10_000_000, 2**31 - 1, 2**32 - 1):
        yield _loose(f"WAV at {rate_hz} Hz", "0.wav", wav[:24] + struct.pack("<I", rate_hz) + wav[28:])
    for channels in (0, 3, 255, 1024, 65535):
        yield _loose(f"WAV of {channels} channels", "0.wav", wav[:22] + struct.pack("<H", channels) + wav[24:])
    at = wav.index(b"data") + 4
    for size in (0, 1, 599, 601, 2**31 - 1, 2**32 - 1):
        yield _loose(f"WAV with {size} bytes of samples", "0.wav", wav[:at] + struct.pack("<I", size) + wav[at + 4 :])
    for bits in (0, 1, 7, 12, 64, 65535):
        yield _loose(f"WAV of {bits} bits", "0.wav", wav[:34] + struct.pack("<H", bits) + wav[36:])
    flac = sound(3000)
    for rate_hz in (0, 1, 1_048_575):
        yield _loose(f"FLAC at {rate_hz} Hz", "0.flac", _streaminfo(flac, rate_hz=rate_hz))
    for total in (0, 1, 2999, 3001, 16000 * 29, 2**36 - 1):
        yield _loose(f"FLAC of {total} samples", "0.flac", _streaminfo(flac, total=total))
    for channels in (2, 8):
        yield _loose(f"FLAC of {channels} channels", "0.flac", _streaminfo(flac, channels=channels))
    yield _loose("FLAC with a wrong MD5", "0.flac", flac[:26] + bytes(16) + flac[42:])
    ogg = sound(3000, format="OGG")
    for granule in (0, 1, 1 << 20, 1 << 35, (1 << 62) + 5, (1 << 63) - 1, (1 << 64) - 1):
        yield _loose(f"OGG that ends at sample {granule}", "0.ogg", _last_granule(ogg, granule))
    mp3 = sound(16000, format="MP3")
    for num_frames in (0, 1, 1 << 20, 0xFFFFFFFF):
        at = max(mp3.find(b"Xing"), mp3.find(b"Info")) + 8
        yield _loose(f"MP3 of {num_frames} frames", "0.mp3", mp3[:at] + struct.pack(">I", num_frames) + mp3[at + 4 :])


def sound_bombs(canary: Path) -> Iterator[Case]:
    """Small files of silence that decode into very much of it, within the limit of seconds."""
    yield _loose("FLAC of 8 channels at 384000 Hz, 10 s", "0.flac", _silence(10, 384_000, 8, "FLAC"))
    yield _loose("OGG of 16 channels at 192000 Hz, 10 s", "0.ogg", _silence(10, 192_000, 16, "OGG"))
    yield _loose("FLAC of an hour", "0.flac", _silence(3600, 8000, 1, "FLAC"))


def _fine(name: str, suffix: str, content: bytes) -> Case:
    samples = beside({"s": media_sample(suffix, content)})
    return Case(name, pack(samples), samples)


def _rotten(name: str, suffix: str, content: bytes) -> Case:
    samples = beside({"s": media_sample(suffix, content)})
    return Case(name, pack(samples), samples, rotten=frozenset({"s"}))


def _loose(name: str, suffix: str, content: bytes) -> Case:
    samples = beside({"s": media_sample(suffix, content)})
    return Case(name, pack(samples), samples, loose=frozenset({"s"}))


def _without_first_frame(mp3: bytes) -> bytes:
    """Without the frame that says how long the sound is."""
    start = mp3.index(b"\xff", 1)
    while mp3[start + 1] & 0xE0 != 0xE0 or mp3[start : start + 2] != mp3[:2]:
        start = mp3.index(b"\xff", start + 1)
    return mp3[start:]


def _streaminfo(flac: bytes, *, rate_hz: int | None = None, channels: int | None = None, total: int | None = None) -> bytes:
    """Other facts in the header: 20 bits of rate, 3 of channels - 1, 5 of bits - 1, 36 of samples."""
    packed = int.from_bytes(flac[18:26], "big")
    for value, shift, bits in ((rate_hz, 44, 20), (None if channels is None else channels - 1, 41, 3), (total, 0, 36)):
        if value is not None:
            packed = packed & ~(((1 << bits) - 1) << shift) | value << shift
    return flac[:18] + packed.to_bytes(8, "big") + flac[26:]


def _last_granule(ogg: bytes, granule: int) -> bytes:
    """Another end of the sound in the last page, with the checksum that belongs to it."""
    start = ogg.rindex(b"OggS")
    page = bytearray(ogg[start:])
    page[6:14], page[22:26] = granule.to_bytes(8, "little"), bytes(4)
    page[22:26] = _ogg_checksum(bytes(page)).to_bytes(4, "little")
    return ogg[:start] + bytes(page)


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of Ogg pages: polynomial 04C11DB7, not reflected, starting from zero."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


def _silence(seconds: int, rate_hz: int, channels: int, format: str) -> bytes:
    """Silence, written in pieces so that making it takes no memory."""
    import io

    import soundfile

    file, block = io.BytesIO(), np.zeros((rate_hz, channels), np.int16)
    with soundfile.SoundFile(file, "w", rate_hz, channels, format=format) as writer:
        for _ in range(seconds):
            writer.write(block)
    return file.getvalue()
