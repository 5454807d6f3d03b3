"""A sample's stored answer as what a head is to answer: label numbers, boxes and pixels of the view, characters.

What a head cannot answer, such as a label that is not its, is refused with the reason instead of becoming a zero.

Legend: H, W pixels of the source picture; h, w cells of a grid over what the model sees of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from megamm.config import Head
from megamm.core.errors import DataError
from megamm.core.geometry import PictureView
from megamm.core.names import did_you_mean
from megamm.core.types import AudioInput, HeadTarget, HeadTargets, ImageInput, Message, Part, Sample, TokenSequence
from megamm.data.media.features import MediaRules
from megamm.data.samples.hidden import joined, media_alone, num_cells
from megamm.data.samples.shapes import instance_map, seen_shapes
from megamm.tasks import template

_NUM_COUNTS = {"linear": 1, "detector": 2, "segmenter": 1, "ctc": 1, "masked": 2}
ANSWERS = {"linear": ("text", "label"), "detector": ("boxes",), "segmenter": ("mask",), "ctc": ("text", "label")}
"""Kind of a head -> the parts that its answers are; a masked head answers nothing."""

_MEDIA = {"detector": "image", "segmenter": "image", "ctc": "audio"}
_MEDIA_OF_TOWER = {"vision": "image", "audio": "audio"}


def question_and_answer(head: Head, sample: Sample) -> tuple[tuple[Message, ...], tuple[Part, ...]]:
    """The messages that the model sees, and the parts that the head is to answer.

    Raises:
        DataError: The sample is a plain document, lacks the one picture or sound that the head looks at, or has an answer of another kind.
    """
    if head.kind == "masked":
        return media_alone(head, sample.messages), ()
    if template.is_document(sample.messages):
        raise DataError(f"a plain document asks nothing that a {head.kind} head could answer; leave its dataset out")
    messages, answer = template.split_answer(sample.messages)
    for part in answer:
        if part.type not in ANSWERS[head.kind]:
            raise DataError(f"the answer holds a {part.type} part, and a {head.kind} head answers with {' or '.join(ANSWERS[head.kind])}")
    check_question(head, messages)
    return messages, answer


def check_question(head: Head, messages: Sequence[Message]) -> None:
    """Refuse a chat without what the head looks at: one picture or sound, or any where it looks at both towers.

    Raises:
        DataError: It holds none, or several.
    """
    wanted = _MEDIA.get(head.kind) or _MEDIA_OF_TOWER.get(head.states)
    if wanted is not None:
        num = sum(part.type == wanted for message in messages for part in message.content)
        if num != 1:
            raise DataError(f"the sample holds {num} {wanted} parts, and this {head.kind} head looks at exactly 1")
    elif head.states == "towers" and not any(part.type in ("image", "audio") for message in messages for part in message.content):
        raise DataError(f"the sample holds no image and no audio, and this {head.kind} head looks at nothing else")


def check_answer(head: Head, answer: Sequence[Part], audio_tokens: Sequence[int]) -> None:
    """Refuse, from texts and headers alone, what the head cannot answer.

    Args:
        head: What it can answer.
        answer: From `question_and_answer`.
        audio_tokens: Tokens of each of the sample's sounds.

    Raises:
        DataError: A label or a character outside the head's, none or several where it takes one, more boxes than it has queries, or more
            characters than the sound has time for.
    """
    check_labels(head, answer)
    if head.kind == "ctc":
        _characters(head, answer, audio_tokens[0])
    elif head.kind == "detector":
        num = sum(len(part.data["boxes"]) for part in answer)
        if head.queries == "learned" and num > head.num_queries:
            raise DataError(f"{num} boxes, and the head finds {head.num_queries} at most; set model.head.num_queries higher")


def check_labels(head: Head, answer: Sequence[Part]) -> None:
    """Refuse labels and characters that the head does not have, however many there are.

    Raises:
        DataError: There is one, or not exactly one label where the head gives one.
    """
    if head.kind == "linear":
        _labels(head, answer)
    elif head.kind == "ctc":
        _numbers(head, list(_text(answer)))
    elif head.kind == "detector":
        _numbers(head, [box["label"] for part in answer for box in part.data["boxes"]])
    elif head.kind == "segmenter":
        _numbers(head, [label for part in answer for label in part.data["labels"]])


def head_target(
    head: Head,
    answer: Sequence[Part],
    *,
    media: Mapping[str, bytes],
    images: Sequence[ImageInput],
    audios: Sequence[AudioInput],
    rules: MediaRules,
) -> HeadTarget:
    """The answer as arrays, moved along with what training makes of the picture.

    Args:
        head: What it can answer.
        answer: From `question_and_answer`.
        media: Member -> bytes, for masks.
        images: The sample's pictures.
        audios: Its sounds.
        rules: How pictures become cells, and what is refused.

    Raises:
        DataError: As `check_answer`; or a box outside its picture, more boxes than cells that ask for them, or a mask that is damaged or of
            another picture.
    """
    check_answer(head, answer, [audio.num_tokens for audio in audios])
    if head.kind == "linear":
        return HeadTarget(_array(_labels(head, answer)), np.ones(1))
    if head.kind == "ctc":
        ids = _characters(head, answer, audios[0].num_tokens)
        return HeadTarget(_array(ids), np.array([float(len(ids))]))
    if head.kind == "detector":
        return _boxes(head, answer, images[0], rules)
    return _pixels(head, answer, media, images[0], rules)


def collate_targets(head: Head, sequences: Sequence[TokenSequence]) -> HeadTargets:
    """Lay the targets of a micro-batch's sequences out one behind the other; there may be no sequence."""
    targets = [sequence.target for sequence in sequences if sequence.target is not None]
    if len(targets) != len(sequences):
        raise DataError("a sequence without a target beside a head; encode all of a run's samples with the same rules")
    nothing = np.zeros((2, 0, 0), np.int16)
    pixels = [nothing if target.pixels is None else target.pixels for target in targets]
    boxes = [np.zeros((0, 4), np.float32) if target.boxes is None else target.boxes for target in targets]
    return HeadTargets(
        weights=np.array([sequence.weights[-1] for sequence in sequences], dtype=np.float32),
        counts=np.array([target.counts for target in targets], dtype=np.float64).reshape(len(targets), _NUM_COUNTS[head.kind]),
        num_ids=np.array([len(target.ids) for target in targets], dtype=np.int64),
        ids=np.concatenate([np.zeros(0, np.int64), *(target.ids for target in targets)]),
        boxes=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        grids=np.array([one.shape[1:] for one in pixels], dtype=np.int64).reshape(len(targets), 2),
        pixels=np.concatenate([nothing.reshape(2, -1), *(one.reshape(2, -1) for one in pixels)], axis=1),
        pictures=joined([target.pictures for target in targets], [num_cells(sequence.images) for sequence in sequences]),
        sounds=joined([target.sounds for target in targets], [num_cells(sequence.audios) for sequence in sequences]),
    )


def _labels(head: Head, answer: Sequence[Part]) -> list[int]:
    if not head.multi_label:
        return _numbers(head, [_text(answer)])
    named = [label.strip() for part in answer for label in part.text.split(",")]
    return sorted(set(_numbers(head, [label for label in named if label])))


def _characters(head: Head, answer: Sequence[Part], num_tokens: int) -> list[int]:
    ids = _numbers(head, list(_text(answer)))
    # Between equal characters stands a pause, else they would be read as one.
    num_needed = len(ids) + sum(one == after for one, after in pairwise(ids))
    if num_needed > num_tokens * head.time_steps:
        raise DataError(
            f"{len(ids)} characters take {num_needed} time steps, and the sound has {num_tokens} states of {head.time_steps} steps; "
            "set model.head.time_steps higher"
        )
    return ids


def _text(answer: Sequence[Part]) -> str:
    return "".join(part.text for part in answer).strip()


def _numbers(head: Head, labels: Sequence[str]) -> list[int]:
    numbers = {label: number for number, label in enumerate(head.labels)}
    for label in labels:
        if label not in numbers:
            raise DataError(f"{label[:40]!r} is not among the {len(head.labels)} of model.head.labels{did_you_mean(label, head.labels)}")
    return [numbers[label] for label in labels]


def _boxes(head: Head, answer: Sequence[Part], image: ImageInput, rules: MediaRules) -> HeadTarget:
    lists = seen_shapes([Message("assistant", tuple(answer))], {}, [image.view], rules)
    # What a change of the picture left of no extent has no place that could be learned.
    shapes = [shape for shapes in lists for shape in shapes if shape.is_visible]
    corners = np.array([shape.bounds for shape in shapes], dtype=np.float32).reshape(-1, 4)
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    num, num_queries = len(shapes), head.num_queries
    if head.queries == "cells":
        rows, columns = _cells(head, image, rules)
        num_queries = rows * columns
        if num > num_queries:
            raise DataError(f"{num} boxes in a picture of {num_queries} cells, each of which finds one; set model.image_features finer")
    counts = np.array([num + head.no_object_weight * (num_queries - num), num], dtype=np.float64)
    return HeadTarget(_array(_numbers(head, [shape.label for shape in shapes])), counts, boxes=boxes)


def _pixels(head: Head, answer: Sequence[Part], media: Mapping[str, bytes], image: ImageInput, rules: MediaRules) -> HeadTarget:
    rows, columns = _cells(head, image, rules)
    grid = rows * 2**head.num_layers, columns * 2**head.num_layers
    instances, classes = np.zeros(grid, dtype=np.int32), np.zeros(grid, dtype=np.int16)
    for part in answer:
        seen = resampled(instance_map(part, media, image.view, rules), image.view, grid)
        numbers = np.array([0, *(1 + number for number in _numbers(head, part.data["labels"]))], dtype=np.int16)
        instances = np.where(seen > 0, seen + instances.max(), instances)
        classes = np.where(seen > 0, numbers[seen], classes)
    return HeadTarget(_array([]), np.array([float(classes.size)]), pixels=np.stack([classes, inner_pixels(instances).astype(np.int16)]))


def _cells(head: Head, image: ImageInput, rules: MediaRules) -> tuple[int, int]:
    """Rows and columns of the states that the head sees of a picture."""
    assert rules.image is not None, "there is a picture, so there is a tower for it"
    merge = rules.image.merge if head.states == "decoder" else 1
    return image.grid[0] // merge, image.grid[1] // merge


def resampled(values_HW: np.ndarray, view: PictureView, grid: tuple[int, int]) -> np.ndarray:
    """int[h, w]: the value of the source pixel under the middle of each cell of a grid over the view, 0 outside the picture."""
    back = view.to_view.inverse()
    ys, xs = np.meshgrid((np.arange(grid[0]) + 0.5) / grid[0], (np.arange(grid[1]) + 0.5) / grid[1], indexing="ij")
    columns = np.floor(back.a * xs + back.b * ys + back.c).astype(np.int64)
    rows = np.floor(back.d * xs + back.e * ys + back.f).astype(np.int64)
    is_inside = (columns >= 0) & (columns < view.width) & (rows >= 0) & (rows < view.height)
    return np.where(is_inside, values_HW[rows.clip(0, view.height - 1), columns.clip(0, view.width - 1)], 0)


def inner_pixels(instances: np.ndarray) -> np.ndarray:
    """bool[h, w]: pixels whose eight neighbours belong to the same instance; of an instance too thin for that, all of it.

    Between two instances that touch there is thus always a seam, except between two that are both so thin.
    """
    padded = np.pad(instances, 1, mode="edge")
    rows, columns = instances.shape
    is_inner = instances > 0
    for down in range(3):
        for right in range(3):
            is_inner &= padded[down : down + rows, right : right + columns] == instances
    has_inner = np.zeros(instances.max(initial=0) + 1, dtype=bool)
    has_inner[instances[is_inner]] = True
    return is_inner | ((instances > 0) & ~has_inner[instances])


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int64)
