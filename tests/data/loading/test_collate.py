"""Collating: rows side by side, padding as a document of its own, media padded to the longest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megamm.config import Data, Dataset, ImageFeatures
from megamm.core.geometry import PictureView
from megamm.core.types import IGNORE_LABEL, AudioInput, ImageInput, PackedRow, TokenSequence
from megamm.data.loading.collate import collate
from megamm.data.loading.loader import StepLoader
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.lengths import ensure_lengths
from tests.data.conftest import BATCH, MODEL


def sequence(length: int, key: str, task: str = "b", images=(), audios=()) -> TokenSequence:
    ids = np.arange(10, 10 + length, dtype=np.int32)
    labels = np.append(ids[1:], IGNORE_LABEL).astype(np.int32)
    weights = (labels != IGNORE_LABEL).astype(np.float32) * np.float32(0.5)
    return TokenSequence("d", key, task, ids, labels, weights, list(images), list(audios))


def test_rows_and_their_padding():
    batch = collate([PackedRow([sequence(3, "x"), sequence(2, "y", task="a")]), PackedRow()], 8, 7, ("a", "b"))
    assert batch.input_ids.tolist() == [[10, 11, 12, 10, 11, 7, 7, 7], [7] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]
    assert batch.labels[0].tolist() == [11, 12, IGNORE_LABEL, 11, *[IGNORE_LABEL] * 4]
    assert batch.task_ids[0].tolist() == [1, 1, 1, 0, 0, -1, -1, -1] and (batch.task_ids[1] == -1).all()
    assert batch.document_lengths == [[3, 2, 3], [8]] and batch.num_padding == [3, 8]
    assert batch.keys == [["d/x", "d/y"], []]
    assert batch.weight_sum == 1.5 and batch.num_tokens == 5
    assert batch.pixels is None and batch.mel is None


def test_a_full_row_has_no_padding_document():
    batch = collate([PackedRow([sequence(4, "x")])], 4, 0, ("b",))
    assert batch.document_lengths == [[4]] and batch.num_padding == [0]


def test_media_are_padded_to_the_longest_and_to_whole_chunks():
    pictures = [
        ImageInput(np.ones((size, 12), np.float32), grid, size, PictureView.whole(8, 8)) for size, grid in ((2, (1, 2)), (6, (3, 2)))
    ]
    sounds = [AudioInput(np.ones((4, frames), np.float32), 1) for frames in (100, 101, 30)]
    rows = [
        PackedRow([sequence(3, "x", images=pictures[:1], audios=sounds[:1])]),
        PackedRow([sequence(3, "y", images=pictures[1:], audios=sounds[1:])]),
    ]
    batch = collate(rows, 4, 0, ("b",))
    assert batch.pixels.shape == (2, 6, 12) and batch.pixel_mask.sum(axis=1).tolist() == [2, 6]
    assert batch.pixels[0, 2:].sum() == 0 and batch.image_grids.tolist() == [[1, 2], [3, 2]]
    assert batch.mel.shape == (3, 4, 200) and batch.mel_mask.sum(axis=1).tolist() == [100, 101, 30]
    assert batch.mel.sum() == 4 * 231


def test_squares_for_a_fixed_size_tower_go_the_whole_way(tmp_path, tokenizer, corpus):
    import shutil

    root = shutil.copytree(corpus, tmp_path / "corpus")
    model = replace(MODEL, image_features=ImageFeatures(kind="fixed", size=32, stride=16, merge=2))
    data = Data(root=str(root), train={"digits": Dataset("digits/*.tar")}, window=16, row_patches=2, max_skipped_share=0.0)
    assert len(ensure_lengths(sorted(root.glob("digits/*.tar")), tokenizer, MediaRules.of(model, data))) == 3
    plan = DataPlan.open(data, BATCH, model=model, tokenizer=tokenizer, seed=0)
    with StepLoader(plan) as loader:
        batch = next(loader).micro_batches[0]
    assert batch.pixels.shape[1:] == (3, 32, 32) and batch.pixel_mask is None
    assert batch.image_grids.tolist() == [[2, 2]] * len(batch.pixels)
    assert 1 <= len(batch.pixels) <= 2
    assert (batch.input_ids == tokenizer.vocabulary.control_id("image")).sum() == len(batch.pixels)
