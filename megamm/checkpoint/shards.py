"""Safetensors files, hashed while they are written, one tensor in host memory at a time.

The safetensors library writes a file whole; hashing needs the bytes on their way. Reading is the library's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

from megamm.checkpoint.manifest import FileFacts

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileFacts:
    """Write and sync a safetensors file; tensors on a device are fetched one by one.

    Source: the safetensors format (8 bytes of header length, JSON header, data without holes).
    """
    # Wide elements first keep every tensor aligned for memory mapping.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = xxhash.xxh3_128()
    num_bytes = 0
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            state.update(block)
            num_bytes += file.write(block)
        for name in names:
            block = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            state.update(block)
            num_bytes += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(num_bytes, state.hexdigest())


def write_bytes(path: Path, data: bytes) -> FileFacts:
    """Write and sync a small file."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(len(data), xxhash.xxh3_128_hexdigest(data))
