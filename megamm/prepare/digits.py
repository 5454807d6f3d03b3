"""scikit-learn's handwritten digits as pictures: no download, 1797 real scans of 8 x 8 pixels.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

from megamm.core.errors import ConfigError
from megamm.prepare.writer import Shard, ShardWriter

PROMPT = "Which digit is this?"
_TEST_EVERY = 5
_SHARD_SAMPLES = 512


def prepare(folder: Path, seed: int = 0) -> list[Shard]:
    """Write `train` and `test` shards of pictures with their digit; every fifth picture of a digit is held out.

    Args:
        folder: Where the shards go.
        seed: Decides which pictures are held out, and the order of the samples.

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: `folder` already holds such shards.
    """
    with ShardWriter(folder, "train", max_samples=_SHARD_SAMPLES) as train, ShardWriter(folder, "test", max_samples=_SHARD_SAMPLES) as test:
        pictures, labels = _load()
        order = list(range(len(labels)))
        random.Random(seed).shuffle(order)
        num_seen = dict.fromkeys(range(10), 0)
        for index in order:
            label = int(labels[index])
            num_seen[label] += 1
            writer = train if num_seen[label] % _TEST_EVERY else test
            writer.write(f"digit-{index:05}", _document(label, index), {"0.png": _png(pictures[index])})
    return train.shards + test.shards


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pictures float64[1797, 8, 8] in 0..16, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ConfigError("the source digits needs scikit-learn; install it with `pip install 'megamm[quickstart]'`") from None
    digits = load_digits()
    return digits.images, digits.target


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(picture * (255 / 16)).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


def _document(label: int, index: int) -> dict[str, object]:
    question = [{"type": "image", "member": "0.png"}, {"type": "text", "text": PROMPT}]
    return {
        "task": "classification",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "label", "text": str(label)}]}],
        "label": str(label),
        "index": index,
    }
