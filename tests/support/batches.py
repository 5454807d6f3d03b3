"""Small random micro-batches made by hand, so that a test says which modalities each row holds."""

from __future__ import annotations

import numpy as np

from megamm.core.lengths import audio_num_tokens
from megamm.core.types import IGNORE_LABEL, Batch

IMAGE_ID, AUDIO_ID, PAD_ID, VOCAB_SIZE = 120, 121, 122, 128
PATCH_SIZE, NUM_MEL, ROW_TOKENS = 4, 40, 48
CONTROL_IDS = {
    "image": IMAGE_ID,
    "audio": AUDIO_ID,
    "pad": PAD_ID,
    "bos": 110,
    "eos": 111,
    "end": 112,
    "image_start": 113,
    "image_end": 114,
    "audio_start": 115,
    "audio_end": 116,
}
SUBSETS = ("empty", "text", "image", "audio", "both")


def random_batch(subset: str, seed: int, *, num_rows: int = 1) -> Batch:
    """Rows of documents of one modality subset: `empty` has no document at all, `both` a picture and a sound in one document.

    Numbers are functions of `subset` and `seed` alone; the numbers of supervised tokens differ between rows.
    """
    random = np.random.default_rng([SUBSETS.index(subset), seed])
    rows = [_random_row(subset, random) for _ in range(num_rows)]
    pixels = [one for row in rows for one in row["pixels"]]
    mels = [one for row in rows for one in row["mels"]]
    batch = Batch(
        input_ids=np.stack([row["ids"] for row in rows]),
        labels=np.stack([row["labels"] for row in rows]),
        weights=np.stack([row["weights"] for row in rows]),
        position_ids=np.stack([row["positions"] for row in rows]),
        task_ids=np.stack([row["tasks"] for row in rows]),
        document_lengths=[row["lengths"] for row in rows],
        num_padding=[row["lengths"][-1] for row in rows],
        tasks=("text",),
    )
    if pixels:
        longest = max(len(one) for one, _ in pixels)
        batch.pixels = np.stack([np.pad(one, ((0, longest - len(one)), (0, 0))) for one, _ in pixels])
        batch.pixel_mask = np.stack([np.arange(longest) < len(one) for one, _ in pixels]).astype(np.int64)
        batch.image_grids = np.array([grid for _, grid in pixels], np.int64)
    if mels:
        batch.mel = np.stack([np.pad(one, ((0, 0), (0, 200 - one.shape[1]))) for one in mels])
        batch.mel_mask = np.stack([np.arange(200) < one.shape[1] for one in mels]).astype(np.int64)
    return batch


def _random_row(subset: str, random: np.random.Generator) -> dict:
    documents, pixels, mels = [], [], []
    for _ in range(0 if subset == "empty" else 2):
        ids = list(random.integers(0, 100, random.integers(3, 7)))
        if subset in ("image", "both"):
            grid = (int(random.integers(1, 3)), int(random.integers(1, 3)))
            pixels.append((random.standard_normal((grid[0] * grid[1], 3 * PATCH_SIZE**2), np.float32), grid))
            ids += [IMAGE_ID] * (grid[0] * grid[1])
        if subset in ("audio", "both"):
            frames = int(random.integers(10, 60))
            mels.append(random.standard_normal((NUM_MEL, frames), np.float32))
            ids += [AUDIO_ID] * audio_num_tokens(frames)
        documents.append([*ids, *random.integers(0, 100, random.integers(1, 5))])
    lengths = [len(one) for one in documents]
    lengths.append(ROW_TOKENS - sum(lengths))
    ids = np.array([token for one in documents for token in one] + [PAD_ID] * lengths[-1], np.int64)
    labels, weights = np.full(ROW_TOKENS, IGNORE_LABEL, np.int64), np.zeros(ROW_TOKENS, np.float32)
    start = 0
    for one in documents:
        for place in range(len(one) - 1):
            if one[place + 1] < 100 and random.random() < 0.8:
                labels[start + place] = one[place + 1]
                weights[start + place] = random.choice([0.5, 1.0, 2.0])
        start += len(one)
    return {
        "ids": ids,
        "labels": labels,
        "weights": weights,
        "positions": np.concatenate([np.arange(length) for length in lengths]).astype(np.int64),
        "tasks": np.where(np.arange(ROW_TOKENS) < start, 0, -1).astype(np.int64),
        "lengths": lengths,
        "pixels": pixels,
        "mels": mels,
    }
