"""Safetensors files, laid out before they are written and hashed on the way to the disk.

The safetensors library writes a file from tensors that are all in memory, and hashing needs the bytes as they pass. A layout
that is known beforehand also lets a snapshot lie in host memory as its file will, and lets a re-shard write slice by slice.
Reading is the library's.

Source: the safetensors format (8 bytes of header length, JSON header, data without holes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from megamm.checkpoint.io import LOCAL, Buffer, Io
from megamm.checkpoint.manifest import FileFacts

_CHUNK_BYTES = 4 << 20
_SYNC_BYTES = 64 << 20
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
DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
"""Safetensors' name of a type -> torch's."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Type and shape of a tensor that is not there yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        """What a tensor has."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardLayout:
    """Where each tensor lies in a safetensors file.

    Attributes:
        specs: Name -> type and shape, in the order of the file.
        starts: Name -> first byte in the data section.
        num_bytes: Size of the data section.
        header: All that goes before the data section.
    """

    def __init__(self, specs: Mapping[str, Spec]):
        # Wide elements first keep every tensor aligned for memory mapping.
        names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
        self.specs = {name: specs[name] for name in names}
        self.starts: dict[str, int] = {}
        table: dict[str, object] = {}
        end = 0
        for name, spec in self.specs.items():
            self.starts[name] = end
            end += spec.num_bytes
            table[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [self.starts[name], end]}
        self.num_bytes = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text


def write_file(path: Path, blocks: Iterable[Buffer], io: Io = LOCAL) -> FileFacts:
    """Write and sync a file, hashing each block just before it is written.

    Large files are synced behind the writing as well, so that the disk does not wait until the last byte is in memory.
    """
    state = xxhash.xxh3_128()
    num_bytes = num_synced = 0
    behind: Future[None] | None = None
    with io.create(path) as file, ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:
        for block in blocks:
            for chunk in _chunks(block):
                state.update(chunk)
                io.write(file, chunk)
                num_bytes += len(chunk)
                if num_bytes - num_synced >= _SYNC_BYTES and (behind is None or behind.done()):
                    # Asked for its result each time: the kernel reports a lost page to one sync only, the last one might not hear of it.
                    if behind is not None:
                        behind.result()
                    behind, num_synced = pool.submit(io.sync, file), num_bytes
        if behind is not None:
            behind.result()
        io.sync(file)
    return FileFacts(num_bytes, state.hexdigest())


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], io: Io = LOCAL) -> FileFacts:
    """Write and sync tensors as a safetensors file; those on a device are fetched one by one."""
    layout = ShardLayout({name: Spec.of(tensor) for name, tensor in tensors.items()})
    return write_file(path, _shard_blocks(layout, tensors), io)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The data of a tensor, row by row; not copied where it lies so in host memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shard_blocks(layout: ShardLayout, tensors: Mapping[str, torch.Tensor]) -> Iterator[Buffer]:
    yield layout.header
    for name in layout.specs:
        yield tensor_bytes(tensors[name])


def _chunks(block: Buffer) -> Iterator[Buffer]:
    """Pieces that are still in the processor's cache when the kernel copies what was just hashed."""
    view = memoryview(block)
    for start in range(0, len(view), _CHUNK_BYTES):
        yield view[start : start + _CHUNK_BYTES]
