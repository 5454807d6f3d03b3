"""The data structures that rooms hand to each other.

Shape legend: T tokens of one sequence, B rows of a micro-batch, S tokens of a row (its capacity), N images,
P patches of an image, M mel bands, F mel frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megamm.core.geometry import PictureView

IGNORE_LABEL = -100
"""Label of a position that is not supervised (the convention of `torch.nn.functional.cross_entropy`)."""

PART_TYPES = ("text", "image", "audio", "boxes", "mask", "label", "item")
ROLES = ("system", "user", "assistant")
MEDIA_TYPES = ("image", "audio")


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a message's content.

    Attributes:
        type: One of `PART_TYPES`.
        text: Characters of a `text` or `label` part; an `item` part's description.
        member: Member suffix of an `image`, `audio` or `mask` part, such as `0.jpg`.
        data: The remaining JSON fields of a `boxes`, `mask` or `item` part.
    """

    type: str
    text: str = ""
    member: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat: `role` (of `ROLES`) and its parts in order."""

    role: str
    content: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one `KEY.json` and its media members say.

    Attributes:
        key: Sample key, unique inside its dataset.
        task: Task name; those in `megamm.tasks.TASKS` can be evaluated.
        messages: The chat; for plain text documents one assistant message.
        media: Member suffix -> bytes, for the members that the messages name.
        metadata: Further JSON fields, kept for slices of an evaluation.
    """

    key: str
    task: str
    messages: tuple[Message, ...]
    media: Mapping[str, bytes] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """What planning must know of a picture or a sound without decoding it.

    Attributes:
        type: `image` or `audio`.
        width: Image width in pixels after EXIF orientation (0 for audio).
        height: Image height in pixels after EXIF orientation (0 for audio).
        num_frames: Audio length in samples at `rate_hz` (0 for images).
        rate_hz: Audio sampling rate in hertz (0 for images).
    """

    type: str
    width: int = 0
    height: int = 0
    num_frames: int = 0
    rate_hz: int = 0


@dataclass(slots=True)
class ImageInput:
    """A picture ready for the vision tower.

    Attributes:
        pixels: float32[P, patch_size * patch_size * 3] for a patch tower (NaFlex), float32[3, H, W] for a fixed-size tower.
        grid: Rows and columns of the tower's feature map before merging, in patches.
        num_tokens: Placeholders that the picture takes in its sequence.
        view: What of the picture `pixels` show.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    num_tokens: int
    view: PictureView


@dataclass(slots=True)
class AudioInput:
    """A sound ready for the audio tower: `mel` float32[M, F] (log-mel, not padded) and its placeholders."""

    mel: np.ndarray
    num_tokens: int


@dataclass(slots=True)
class HiddenCells:
    """Cells of pictures, or states of sounds, that the model does not see and is to fill in.

    Attributes:
        numbers: int64[n], counted through all of the pictures, or sounds, of the sample or micro-batch, in the order of their placeholders.
        values: float32[n, v], what was there; not a number past the end of a sound.
        documents: int64[n], of which document of the micro-batch; zeros for a sample alone.
    """

    numbers: np.ndarray
    values: np.ndarray
    documents: np.ndarray


@dataclass(slots=True)
class HeadTarget:
    """What a head is to answer of one sample.

    Attributes:
        ids: int64[n], numbers of labels: of the sample, of each box, or of each character.
        counts: float64[k], what this sample adds to each count that the head's loss is divided by.
        boxes: float32[n, 4], centre x and y, width and height in shares of the view; None but for a detector.
        pixels: int16[2, h, w] on a grid over the view: one more than the label's number, 0 where nothing is, and whether the pixel
            is inside its instance, away from its border; None but for a segmenter.
        pictures: What is hidden of its pictures; None but for a masked head that looks at them.
        sounds: What is hidden of its sounds; likewise.
    """

    ids: np.ndarray
    counts: np.ndarray
    boxes: np.ndarray | None = None
    pixels: np.ndarray | None = None
    pictures: HiddenCells | None = None
    sounds: HiddenCells | None = None


@dataclass(slots=True)
class TokenSequence:
    """One sample in the model's language.

    Attributes:
        dataset: Name of its dataset.
        key: Sample key.
        task: Task name.
        input_ids: int32[T].
        labels: int32[T]; the next token where it is supervised, `IGNORE_LABEL` elsewhere.
        weights: float32[T]; loss weight of the label at the same position, 0 where it is ignored.
        images: In the order of their placeholders.
        audios: In the order of their placeholders.
        target: What a head is to answer; None where the answer is in tokens. Then no label is there, and the weight of the last
            token is the sample's.
    """

    dataset: str
    key: str
    task: str
    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    images: list[ImageInput] = field(default_factory=list)
    audios: list[AudioInput] = field(default_factory=list)
    target: HeadTarget | None = None


@dataclass(slots=True)
class PackedRow:
    """The sequences that share one row, in order; an empty list is an empty row."""

    sequences: list[TokenSequence] = field(default_factory=list)


@dataclass(slots=True)
class HeadTargets:
    """What a head is to answer of the documents of a micro-batch, padding left out: their `HeadTarget`s one behind the other.

    Legend: D documents, K counts.

    Attributes:
        weights: float32[D], loss weight of each document.
        counts: float64[D, K].
        num_ids: int64[D].
        ids: int64[sum of num_ids].
        boxes: float32[sum of num_ids, 4]; empty but for a detector.
        grids: int64[D, 2], rows and columns of pixels; zeros but for a segmenter.
        pixels: int16[2, sum of rows x columns]; empty but for a segmenter.
        pictures: What is hidden of all pictures; None where nothing is.
        sounds: What is hidden of all sounds; likewise.
    """

    weights: np.ndarray
    counts: np.ndarray
    num_ids: np.ndarray
    ids: np.ndarray
    boxes: np.ndarray
    grids: np.ndarray
    pixels: np.ndarray
    pictures: HiddenCells | None = None
    sounds: HiddenCells | None = None


@dataclass(slots=True)
class Batch:
    """One micro-batch of one rank. Arrays are NumPy here; `train/step` moves them to the device.

    Padding forms a last document of its own in each row (position_ids restart at 0, nothing supervised).

    Attributes:
        input_ids: int64[B, S].
        labels: int64[B, S], already shifted; `IGNORE_LABEL` where not supervised.
        weights: float32[B, S], loss weight a label, 0 where ignored.
        position_ids: int64[B, S], restart at 0 with every document.
        task_ids: int64[B, S], index into `tasks` of the document that a token belongs to, -1 on padding.
        document_lengths: For each row the lengths of its documents in order; they sum to S, the padding document last.
        num_padding: For each row the tokens of its padding document (0 when it is full).
        tasks: Task names that `task_ids` index (the same list on all ranks).
        pixels: float32[N, P, patch_dim] or float32[N, 3, H, W]; None without images.
        pixel_mask: int64[N, P], 1 for real patches; None for fixed-size towers or without images.
        image_grids: int64[N, 2], rows and columns in patches; None without images.
        mel: float32[N, M, F], zero-padded to a multiple of the tower's chunk; None without audio.
        mel_mask: int64[N, F], 1 for real frames; None without audio.
        keys: For each row the `dataset/key` of its documents.
        head: What a head is to answer; None where answers are in tokens.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    position_ids: np.ndarray
    task_ids: np.ndarray
    document_lengths: list[list[int]]
    num_padding: list[int]
    tasks: tuple[str, ...]
    pixels: np.ndarray | None = None
    pixel_mask: np.ndarray | None = None
    image_grids: np.ndarray | None = None
    mel: np.ndarray | None = None
    mel_mask: np.ndarray | None = None
    keys: list[list[str]] = field(default_factory=list)
    head: HeadTargets | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return self.input_ids.size - sum(self.num_padding)

    @property
    def weight_sum(self) -> float:
        """Sum of the loss weights of all supervised tokens."""
        return float(self.weights.sum(dtype=np.float64))
