"""scikit-learn's handwritten digits as pictures: no download, 1797 real scans of 8 x 8 pixels.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import io
import random

import numpy as np

from megamm.core.errors import ConfigError
from megamm.prepare.source import SEED, Draft, Listing, Record, Source

_QUESTION = "Which digit is this?"
_TEST_EVERY = 5
_SIDE = 8


def _records(*, seed: int) -> Listing:
    """Every picture is a record; every fifth picture of a digit is held out, and the seed decides which.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    pictures, labels = _load()
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    records: dict[int, Record] = {}
    num_seen = dict.fromkeys(range(10), 0)
    for index in order:
        label = int(labels[index])
        num_seen[label] += 1
        values = np.rint(pictures[index] * (255 / 16)).astype(np.uint8)
        split = "train" if num_seen[label] % _TEST_EVERY else "test"
        records[index] = Record(f"digit-{index:05}", values.size, (index, label, values.tobytes()), split)
    return Listing([records[index] for index in range(len(labels))], _make)


def _make(record: Record) -> Draft:
    from PIL import Image

    index, label, values = record.data
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(values, np.uint8).reshape(_SIDE, _SIDE)).save(file, format="PNG")
    question = [{"type": "image", "member": "0.png"}, {"type": "text", "text": _QUESTION}]
    answer = [{"type": "label", "text": str(label)}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Draft({"task": "classification", "messages": messages, "label": str(label), "index": index}, {"0.png": file.getvalue()})


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pictures float64[1797, 8, 8] in 0..16, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ConfigError("the source digits needs scikit-learn; install it with `pip install 'megamm[quickstart]'`") from None
    digits = load_digits()
    return digits.images, digits.target


SOURCE = Source(
    name="digits",
    help="scikit-learn's 1797 handwritten digits as pictures",
    records=_records,
    options=(SEED,),
    samples_a_shard=512,
)
