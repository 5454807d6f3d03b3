"""Packed rows to the arrays of a micro-batch. Legend: B rows, S tokens of a row, N pictures or sounds, P patches, F frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megamm.config import Head
from megamm.core.lengths import AUDIO_CHUNK_FRAMES
from megamm.core.types import IGNORE_LABEL, AudioInput, Batch, HeadTargets, HiddenCells, ImageInput, PackedRow
from megamm.data.samples.targets import collate_targets


def collate(rows: Sequence[PackedRow], row_tokens: int, pad_id: int, tasks: tuple[str, ...], *, head: Head | None = None) -> Batch:
    """Lay rows out side by side; what a row does not fill becomes a padding document of its own.

    Args:
        rows: The rows; an empty one becomes nothing but padding.
        row_tokens: S.
        pad_id: Id of padding.
        tasks: Names that `task_ids` will index.
        head: What answers in place of tokens.
    """
    shape = (len(rows), row_tokens)
    batch = Batch(
        input_ids=np.full(shape, pad_id, dtype=np.int64),
        labels=np.full(shape, IGNORE_LABEL, dtype=np.int64),
        weights=np.zeros(shape, dtype=np.float32),
        position_ids=np.zeros(shape, dtype=np.int64),
        task_ids=np.full(shape, -1, dtype=np.int64),
        document_lengths=[],
        num_padding=[],
        tasks=tasks,
    )
    for number, row in enumerate(rows):
        start = 0
        for sequence in row.sequences:
            place = number, slice(start, start + len(sequence.input_ids))
            batch.input_ids[place] = sequence.input_ids
            batch.labels[place] = sequence.labels
            batch.weights[place] = sequence.weights
            batch.position_ids[place] = np.arange(len(sequence.input_ids))
            batch.task_ids[place] = tasks.index(sequence.task)
            start += len(sequence.input_ids)
        padding = row_tokens - start
        batch.position_ids[number, start:] = np.arange(padding)
        batch.document_lengths.append([len(sequence.input_ids) for sequence in row.sequences] + [padding] * (padding > 0))
        batch.num_padding.append(padding)
        batch.keys.append([f"{sequence.dataset}/{sequence.key}" for sequence in row.sequences])
    sequences = [sequence for row in rows for sequence in row.sequences]
    _add_images(batch, [image for sequence in sequences for image in sequence.images])
    _add_audios(batch, [audio for sequence in sequences for audio in sequence.audios])
    if head is not None:
        batch.head = collate_targets(head, sequences)
    return batch


def batch_bytes(batch: Batch) -> int:
    """Size of the arrays of a micro-batch."""
    return _array_bytes(batch)


def _array_bytes(arrays: Batch | HeadTargets | HiddenCells) -> int:
    values = [getattr(arrays, name) for name in arrays.__slots__]
    nested = sum(_array_bytes(value) for value in values if isinstance(value, HeadTargets | HiddenCells))
    return nested + sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def _add_images(batch: Batch, images: list[ImageInput]) -> None:
    if not images:
        return
    batch.image_grids = np.array([image.grid for image in images], dtype=np.int64)
    if images[0].pixels.ndim == 3:
        batch.pixels = np.stack([image.pixels for image in images])
        return
    num_patches = max(len(image.pixels) for image in images)
    batch.pixels = np.zeros((len(images), num_patches, images[0].pixels.shape[1]), dtype=np.float32)
    batch.pixel_mask = np.zeros((len(images), num_patches), dtype=np.int64)
    for number, image in enumerate(images):
        batch.pixels[number, : len(image.pixels)] = image.pixels
        batch.pixel_mask[number, : len(image.pixels)] = 1


def _add_audios(batch: Batch, audios: list[AudioInput]) -> None:
    if not audios:
        return
    longest = max(audio.mel.shape[1] for audio in audios)
    num_frames = -(-longest // AUDIO_CHUNK_FRAMES) * AUDIO_CHUNK_FRAMES
    batch.mel = np.zeros((len(audios), audios[0].mel.shape[0], num_frames), dtype=np.float32)
    batch.mel_mask = np.zeros((len(audios), num_frames), dtype=np.int64)
    for number, audio in enumerate(audios):
        batch.mel[number, :, : audio.mel.shape[1]] = audio.mel
        batch.mel_mask[number, : audio.mel.shape[1]] = 1
