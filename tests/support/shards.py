"""Small real shards, written by webdataset's own writer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from webdataset.writer import TarWriter

Files = Mapping[str, bytes]


def jpeg(width: int, height: int, *, seed: int = 0, format: str = "JPEG", **options: Any) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, format, **options)
    return file.getvalue()


def flac(num_frames: int, *, rate_hz: int = 16000, seed: int = 0, channels: int = 1, format: str = "FLAC") -> bytes:
    values = np.random.default_rng(seed).uniform(-0.5, 0.5, (num_frames, channels)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, values, rate_hz, format=format)
    return file.getvalue()


def text_document(text: str) -> dict[str, Any]:
    return {"task": "text", "messages": [{"role": "assistant", "content": [{"type": "text", "text": text}]}]}


def chat(question: Sequence[Mapping[str, Any]], answer: str, task: str = "classification") -> dict[str, Any]:
    reply = [{"type": "text", "text": answer}]
    return {"task": task, "messages": [{"role": "user", "content": list(question)}, {"role": "assistant", "content": reply}]}


def as_files(document: Mapping[str, Any], **media: bytes) -> dict[str, bytes]:
    """Members of one sample; `_0_jpg=...` is the member `0.jpg`."""
    return {"json": json.dumps(document).encode(), **{name.strip("_").replace("_", "."): content for name, content in media.items()}}


def write_tar(path: Path, samples: Mapping[str, Files]) -> Path:
    """Write key -> members as a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    return path
