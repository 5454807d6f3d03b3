"""Damage of the tar itself: cuts, flipped bits, holes. Each before and after the shard was indexed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import BLOCK, flipped, headers, healthy, pack, payloads

NUM_HEADER_BITS = BLOCK * 8


def cut_before(canary: Path) -> Iterator[Case]:
    """Every length of the shard below its own."""
    content = pack(healthy())
    for size in range(len(content)):
        yield Case(f"{size} of {len(content)} bytes", content[:size], healthy())


def cut_after(canary: Path) -> Iterator[Case]:
    """The same, once index and lengths are there."""
    content = pack(healthy())
    for size in range(len(content)):
        yield Case(f"{size} of {len(content)} bytes", content, healthy(), found=content[:size])


def cut_while_read(canary: Path) -> Iterator[Case]:
    """The shard is cut, or gone, once training has opened it."""
    content = pack(healthy())
    for size in range(0, len(content), BLOCK // 4):
        yield Case(f"{size} bytes stay", content, healthy(), during=lambda tar, size=size: _cut(tar, size))
    yield Case("the shard is gone", content, healthy(), during=Path.unlink)


def header_bits_before(canary: Path) -> Iterator[Case]:
    """Every bit of every header of a shard of three members."""
    content, truth = _two_samples()
    for start in headers(content):
        for bit in range(NUM_HEADER_BITS):
            yield Case(f"header at {start}, bit {bit}", flipped(content, start * 8 + bit), truth)


def header_bits_after(canary: Path) -> Iterator[Case]:
    """The same, once index and lengths are there."""
    content, truth = _two_samples()
    for start in headers(content):
        for bit in range(NUM_HEADER_BITS):
            yield Case(f"header at {start}, bit {bit}", content, truth, found=flipped(content, start * 8 + bit))


def payload_bits_before(canary: Path) -> Iterator[Case]:
    """Every third bit of a picture's sample, before indexing: nothing tells what the bytes should have been."""
    content = pack(healthy())
    for name, bit in islice(_payload_bits(content), 0, None, 3):
        yield Case(f"{name}, bit {bit}", flipped(content, bit), healthy(), loose=frozenset({"p0"}))


def payload_bits_after(canary: Path) -> Iterator[Case]:
    """Every bit of a picture's sample, after indexing; every eighth try before the lengths were planned."""
    content = pack(healthy())
    for number, (name, bit) in enumerate(_payload_bits(content)):
        yield Case(f"{name}, bit {bit}", content, healthy(), found=flipped(content, bit), planned=number % 8 != 0)


def holes_before(canary: Path) -> Iterator[Case]:
    """Zeros in place of 512 to 4096 bytes, before indexing. Text, pictures and sounds that lost bytes may be used as they stand."""
    content = pack(healthy())
    spans = payloads(content).values()
    for start, size in _holes(content):
        hit = any(start < offset + length and offset < start + size for offset, length in spans)
        yield Case(
            f"{size} bytes at {start}", _with_hole(content, start, size), healthy(), loose=frozenset(healthy()) if hit else frozenset()
        )


def holes_after(canary: Path) -> Iterator[Case]:
    """The same, once index and lengths are there."""
    content = pack(healthy())
    for start, size in _holes(content):
        yield Case(f"{size} bytes at {start}", content, healthy(), found=_with_hole(content, start, size))


def garbage(canary: Path) -> Iterator[Case]:
    """Whole blocks of noise, blocks swapped or repeated, bytes that follow the end, before and after indexing."""
    content, noise = pack(healthy()), random.Random(0)
    num_blocks = len(content) // BLOCK
    blocks = [content[number * BLOCK : (number + 1) * BLOCK] for number in range(num_blocks)]
    damaged = {
        "bytes after the end": content + b"x" * BLOCK,
        "another archive after the end": content + content,
        "no end": content[: -2 * BLOCK],
    }
    for number in range(num_blocks - 2):
        damaged[f"noise in block {number}"] = b"".join([*blocks[:number], noise.randbytes(BLOCK), *blocks[number + 1 :]])
        damaged[f"block {number} twice"] = b"".join([*blocks[: number + 1], *blocks[number:]])
        damaged[f"block {number} left out"] = b"".join([*blocks[:number], *blocks[number + 1 :]])
        damaged[f"block {number} changed places"] = b"".join([*blocks[:number], blocks[number + 1], blocks[number], *blocks[number + 2 :]])
    anything = frozenset(healthy())
    for name, found in damaged.items():
        yield Case(f"{name}, before", found, healthy(), loose=anything)
        yield Case(f"{name}, after", content, healthy(), found=found)


def replaced(canary: Path) -> Iterator[Case]:
    """After indexing another shard of the same size takes the place: before training opens it, and while it is read."""
    content = pack(healthy())
    for seed in range(16):
        other = pack(_alike(seed))
        assert len(other) == len(content), "a replacement of another size would be another fault"
        yield Case(f"replacement {seed}", content, healthy(), found=other)
        yield Case(f"replacement {seed}, before planning", content, healthy(), found=other, planned=False)
        yield Case(f"replacement {seed}, while read", content, healthy(), during=lambda tar, other=other: _replace(tar, other))


def _two_samples() -> tuple[bytes, dict[str, dict[str, bytes]]]:
    truth = {key: healthy()[key] for key in ("t0", "p0")}
    return pack(truth), truth


def _payload_bits(content: bytes) -> Iterator[tuple[str, int]]:
    for name, (offset, size) in payloads(content).items():
        if name.startswith("p0"):
            for bit in range(offset * 8, (offset + size) * 8):
                yield name, bit


def _holes(content: bytes) -> Iterator[tuple[int, int]]:
    for size in (512, 1024, 4096):
        for start in range(0, len(content) - 2 * BLOCK, 128):
            yield start, min(size, len(content) - start)


def _with_hole(content: bytes, start: int, size: int) -> bytes:
    return content[:start] + bytes(size) + content[start + size :]


def _alike(seed: int) -> dict[str, dict[str, bytes]]:
    """Samples whose shard has the same size: texts of the same length, or keys in another order."""
    samples, number = healthy(), 1 + seed // 2
    if seed % 2:
        return {key: samples[key] for key in ("t1", "s0", "p0", "t0")} if seed == 1 else _answered(samples, f"a larg{number}  reply")
    return {key: {name: body.replace(b" text", b"%5d" % number) for name, body in files.items()} for key, files in samples.items()}


def _answered(samples: dict[str, dict[str, bytes]], answer: str) -> dict[str, dict[str, bytes]]:
    return {key: {name: body.replace(b"a small answer", answer.encode()) for name, body in files.items()} for key, files in samples.items()}


def _cut(tar: Path, size: int) -> None:
    with tar.open("r+b") as file:
        file.truncate(size)


def _replace(tar: Path, content: bytes) -> None:
    new = tar.with_name("new")
    new.write_bytes(content)
    new.replace(tar)
