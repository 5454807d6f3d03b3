"""Sidecar files: NumPy arrays and JSON facts in one safetensors file, memory-mapped on load and protected by a digest.

safetensors itself notices no flipped bit, so the digest of the facts and of every array is part of the file. Its writer
orders the header by chance; here equal contents are equal bytes, so that sidecars can be compared and cached by digest.

Source: the format of safetensors files (8 bytes of header size, a JSON header padded to 8 bytes, arrays without gaps).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megamm.core.errors import DataError
from megamm.core.files import atomic_file, canonical_json, digest_text

_DTYPES = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I32": np.int32,
    "I64": np.int64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class ArrayFile:
    """An opened sidecar.

    Attributes:
        facts: The JSON facts.
        arrays: Read-only views of the mapped file, by name.
        digest: xxh3-128 over facts and arrays, 32 hexadecimal digits.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    digest: str


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    """Atomically write a sidecar.

    Args:
        path: Where to.
        arrays: C-contiguous integer arrays by name.
        facts: JSON values.

    Returns:
        The file's digest.
    """
    # Wide types first, as safetensors does it, so that every array is aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    raw = {name: np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data for name in names}
    text = canonical_json(dict(facts))
    contents = {name: [_NAMES[arrays[name].dtype], list(arrays[name].shape), xxhash.xxh3_128_hexdigest(raw[name])] for name in names}
    digest = _digest(text, contents)
    header: dict[str, Any] = {"__metadata__": {"facts": text, "digest": digest}}
    end = 0
    for name in names:
        start, end = end, end + len(raw[name])
        header[name] = {"dtype": contents[name][0], "shape": contents[name][1], "data_offsets": [start, end]}
    head = canonical_json(header).encode()
    head += b" " * (-len(head) % _ALIGNMENT_BYTES)
    with atomic_file(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.writelines(raw[name] for name in names)
    return digest


def read_facts(path: Path) -> tuple[dict[str, Any], str]:
    """Facts and stated digest of a sidecar, from its header alone (nothing is verified beyond the layout).

    Raises:
        ValueError: The file is not whole.
        FileNotFoundError: There is no such file.
    """
    with path.open("rb") as file:
        facts, digest, _, _ = _read_header(file)
    return facts, digest


def map_arrays(path: Path) -> ArrayFile:
    """Memory-map a sidecar after verifying its digest by streaming, which leaves no page of it in this process.

    Raises:
        ValueError: The file is not whole or any bit of it changed.
        FileNotFoundError: There is no such file.
    """
    with path.open("rb") as file:
        facts, digest, layout, start = _read_header(file)
        file.seek(start)
        contents = {}
        for name, (dtype, shape, _) in layout.items():
            contents[name] = [dtype, list(shape), _stream_digest(file, _num_bytes(dtype, shape))]
        if _digest(canonical_json(facts), contents) != digest:
            raise ValueError("its digest does not match its bytes")
        raw = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    arrays = {}
    for name, (dtype, shape, offset) in layout.items():
        content = raw[start + offset : start + offset + _num_bytes(dtype, shape)]
        arrays[name] = content.view(_DTYPES[dtype]).reshape(shape)
    return ArrayFile(facts, arrays, digest)


def load_arrays(path: Path, *, subject: str, fix: str) -> ArrayFile:
    """`map_arrays` with one-line errors for people.

    Args:
        path: The sidecar.
        subject: What the sidecar belongs to, named first in an error.
        fix: What to run, named last.

    Raises:
        DataError: The sidecar is missing or damaged.
    """
    try:
        return map_arrays(path)
    except FileNotFoundError:
        raise DataError(f"{subject}: {path.name} is missing; {fix}") from None
    except ValueError as error:
        raise DataError(f"{subject}: {path.name} is damaged ({error}); delete it and {fix}") from None


def _digest(facts_text: str, contents: Mapping[str, Sequence[Any]]) -> str:
    """Digest of the facts and of dtype, shape and digest of every array, whatever order they are stored in."""
    return digest_text(facts_text + "\n" + canonical_json(contents))


def _stream_digest(file: Any, num_bytes: int) -> str:
    state = xxhash.xxh3_128()
    while num_bytes and (block := file.read(min(num_bytes, _BLOCK_BYTES))):
        state.update(block)
        num_bytes -= len(block)
    return state.hexdigest()


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize


def _read_header(file: Any) -> tuple[dict[str, Any], str, dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Facts, digest, layout (dtype, shape, offset by name, in stored order) and where the arrays start."""
    file.seek(0, 2)
    file_size = file.tell()
    file.seek(0)
    prefix = file.read(8)
    size = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or size > min(_MAX_HEADER_BYTES, file_size - 8):
        raise ValueError(f"a header of {size} bytes in a file of {file_size}")
    try:
        header = json.loads(file.read(size).decode())
        metadata = header.pop("__metadata__")
        facts, digest = json.loads(metadata["facts"]), str(metadata["digest"])
        layout = {
            name: (str(entry["dtype"]), tuple(int(length) for length in entry["shape"]), [int(at) for at in entry["data_offsets"]])
            for name, entry in header.items()
        }
        return facts, digest, _checked_layout(layout, file_size - 8 - size), 8 + size
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header cannot be read: {type(error).__name__}") from None


def _checked_layout(layout: Any, num_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Arrays follow each other without gap or overlap and end where the file ends."""
    position, checked = 0, {}
    for name in sorted(layout, key=lambda name: layout[name][2]):
        dtype, shape, span = layout[name]
        if dtype not in _DTYPES or min(shape, default=0) < 0:
            raise ValueError(f"array {name} has dtype {dtype} and shape {shape}")
        end = position + _num_bytes(dtype, shape)
        if span != [position, end]:
            raise ValueError(f"array {name} lies at {span}, expected {[position, end]}")
        checked[name] = (dtype, shape, position)
        position = end
    if position != num_bytes:
        raise ValueError(f"{num_bytes} bytes of arrays, expected {position}")
    return checked
