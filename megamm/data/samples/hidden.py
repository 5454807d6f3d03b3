"""What a masked head is to fill in: cells of pictures and states of sounds that are blanked before the model sees them.

What is hidden depends on the run's seed and the sample's position alone, as augmentation does, so a resumed run, at any scale, repeats it.

Legend: R, C rows and columns of a picture's cells, P cells, s side of a cell in pixels, M mel bands, F mel frames, v values of a cell.

Source: Xie et al. 2022, SimMIM (blank in place, fill in by one linear layer); sounds likewise, in stretches of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megamm.config import Head
from megamm.core.errors import DataError
from megamm.core.lengths import AUDIO_CHUNK_FRAMES, AUDIO_STATE_FRAMES, audio_num_tokens
from megamm.core.types import AudioInput, HeadTarget, HiddenCells, ImageInput, Message

_MEDIA = {"vision": ("image",), "audio": ("audio",), "towers": ("image", "audio")}
_STATES_A_CHUNK = audio_num_tokens(AUDIO_CHUNK_FRAMES)
# Tells these draws from those of augmentation at the same position.
_STREAM = 0x6D61736B


def masking_random(seed: int, position: int) -> np.random.Generator:
    """Draws what is hidden of the sample at a position of the run."""
    return np.random.default_rng([seed, position, _STREAM])


def media_alone(head: Head, messages: Sequence[Message]) -> tuple[Message, ...]:
    """One message of a chat's pictures and sounds, wherever they stand, as far as the head looks at them; texts are left out.

    Raises:
        DataError: There is none.
    """
    wanted = _MEDIA[head.states]
    parts = tuple(part for message in messages for part in message.content if part.type in wanted)
    if not parts:
        raise DataError(f"the sample holds no {' and no '.join(wanted)}, and a masked head fills in nothing else; leave its dataset out")
    return (Message("user", parts),)


def hide(
    head: Head, images: Sequence[ImageInput], audios: Sequence[AudioInput], random: np.random.Generator
) -> tuple[list[ImageInput], list[AudioInput], HeadTarget]:
    """Blank a share of each picture's and each sound's cells, and keep what was there as the target.

    Args:
        head: How much is hidden, and in blocks of which size.
        images: The sample's pictures.
        audios: Its sounds.
        random: Draws the places.

    Returns:
        Pictures and sounds with zeros in the hidden cells, and the target, whose counts are the hidden values of pictures and of sounds.

    Raises:
        DataError: No medium has two cells, so that nothing would be left to fill in from.
    """
    pictures = [_blank_picture(one, hidden_cells(one.grid, head.mask_share, head.mask_span, random)) for one in images]
    sounds = [_blank_sound(one, hidden_cells((1, one.num_tokens), head.mask_share, head.mask_span, random)) for one in audios]
    counts = [sum(int(np.isfinite(cells.values).sum()) for _, cells in media) for media in (pictures, sounds)]
    if not any(counts):
        raise DataError("each picture and sound of the sample is a single cell, and of two one would stay to fill in from; leave it out")
    target = HeadTarget(
        ids=np.zeros(0, dtype=np.int64),
        counts=np.array(counts, dtype=np.float64),
        pictures=_of_one_sample(pictures, images),
        sounds=_of_one_sample(sounds, audios),
    )
    return [image for image, _ in pictures], [audio for audio, _ in sounds], target


def hidden_cells(grid: tuple[int, int], share: float, span: int, random: np.random.Generator) -> np.ndarray:
    """int64[n]: ascending numbers of cells to hide, the wanted share of them, at least one, and never all; none of a single cell.

    Args:
        grid: Rows and columns.
        share: Of the cells.
        span: Side of the blocks in which they are hidden; the last one is cut off where the share is reached.
        random: Draws the blocks.
    """
    rows, columns = grid
    wanted = min(max(1, round(share * rows * columns)), rows * columns - 1)
    is_hidden = np.zeros(grid, dtype=bool)
    # The corner of a block may lie before the grid, so that border cells are hidden as often as others.
    for corner in random.permutation((rows + span - 1) * (columns + span - 1)).tolist():
        if wanted <= 0:
            break
        top, left = corner // (columns + span - 1) - span + 1, corner % (columns + span - 1) - span + 1
        block = np.zeros(grid, dtype=bool)
        block[max(top, 0) : top + span, max(left, 0) : left + span] = True
        new = np.flatnonzero(block & ~is_hidden)[:wanted]
        is_hidden.flat[new] = True
        wanted -= len(new)
    return np.flatnonzero(is_hidden).astype(np.int64)


def num_cells(media: Sequence[ImageInput | AudioInput]) -> int:
    """Cells of a sample's pictures, or states of its sounds."""
    return sum(one.grid[0] * one.grid[1] if isinstance(one, ImageInput) else one.num_tokens for one in media)


def joined(hidden: Sequence[HiddenCells | None], nums: Sequence[int]) -> HiddenCells | None:
    """What is hidden of the documents of a micro-batch, its cells counted through; None where nothing is.

    Args:
        hidden: Of each document.
        nums: Cells that each document has.
    """
    starts = np.cumsum([0, *nums])
    there = [(document, one) for document, one in enumerate(hidden) if one is not None]
    if not there:
        return None
    return HiddenCells(
        numbers=np.concatenate([one.numbers + starts[document] for document, one in there]),
        values=np.concatenate([one.values for _, one in there]),
        documents=np.concatenate([np.full(len(one.numbers), document, dtype=np.int64) for document, one in there]),
    )


def _of_one_sample(blanked: Sequence[tuple[Any, HiddenCells]], media: Sequence[ImageInput | AudioInput]) -> HiddenCells | None:
    """What is hidden of all pictures, or sounds, of a sample."""
    cells = joined([cells for _, cells in blanked], [num_cells([medium]) for medium in media])
    return None if cells is None else replace(cells, documents=np.zeros_like(cells.documents))


def _blank_picture(image: ImageInput, numbers: np.ndarray) -> tuple[ImageInput, HiddenCells]:
    """The picture with cells set to zero, and what was there: row by row, channels last."""
    pixels = image.pixels.copy()
    if pixels.ndim == 2:
        values = image.pixels[numbers]
        pixels[numbers] = 0.0
    else:
        side = pixels.shape[1] // image.grid[0]
        rows, columns = np.divmod(numbers, image.grid[1])
        cells = pixels.reshape(3, image.grid[0], side, image.grid[1], side).transpose(1, 3, 2, 4, 0)
        values = cells[rows, columns].reshape(len(numbers), -1)
        cells[rows, columns] = 0.0
    return replace(image, pixels=pixels), HiddenCells(numbers, values, np.zeros_like(numbers))


def _blank_sound(audio: AudioInput, numbers: np.ndarray) -> tuple[AudioInput, HiddenCells]:
    """The sound with the frames of some states set to zero, and what was there: frame by frame."""
    mel = audio.mel.copy()
    num_mel, num_frames = mel.shape
    values = np.full((len(numbers), AUDIO_STATE_FRAMES, num_mel), np.nan, dtype=np.float32)
    for row, number in enumerate(numbers.tolist()):
        start, stop = state_frames(number, num_frames)
        values[row, : stop - start] = audio.mel[:, start:stop].T
        mel[:, start:stop] = 0.0
    return replace(audio, mel=mel), HiddenCells(numbers, values.reshape(len(numbers), -1), np.zeros_like(numbers))


def state_frames(number: int, num_frames: int) -> tuple[int, int]:
    """First mel frame of an audio tower's state and the one past its last: the tower's strides begin anew with every chunk."""
    chunk, within = divmod(number, _STATES_A_CHUNK)
    start = chunk * AUDIO_CHUNK_FRAMES + within * AUDIO_STATE_FRAMES
    return start, min(start + AUDIO_STATE_FRAMES, (chunk + 1) * AUDIO_CHUNK_FRAMES, num_frames)
