"""Boxes and masks of a sample as shapes in what the model sees of their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megamm.core.geometry import PictureView, Shape, seen_box, seen_outline
from megamm.core.masks import outline
from megamm.core.types import MediaFacts, Message, Part
from megamm.data.media.features import MediaRules
from megamm.data.media.files import MediaError, decode_mask

_NOWHERE = (0.0, 0.0)


def planned_shapes(messages: Sequence[Message], pictures: Sequence[MediaFacts], outline_points: int) -> list[list[Shape]]:
    """Shapes of each boxes and mask part that take as many tokens as the real ones, without decoding anything.

    Args:
        messages: The chat.
        pictures: What the headers of its pictures say.
        outline_points: Corners of an instance's outline.

    Raises:
        MediaError: A box lies outside its picture.
    """
    shapes = []
    for part in _parts(messages):
        if part.type == "boxes":
            picture = pictures[part.data["image"]]
            shapes.append(_boxes(part, PictureView.whole(picture.width, picture.height)))
        else:
            shapes.append([Shape(label, (_NOWHERE,) * outline_points) for label in part.data["labels"]])
    return shapes


def seen_shapes(
    messages: Sequence[Message], media: Mapping[str, bytes], views: Sequence[PictureView], rules: MediaRules
) -> list[list[Shape]]:
    """Shapes of each boxes and mask part, in the order of the parts.

    Args:
        messages: The chat.
        media: Member -> bytes.
        views: Of each picture of the chat.
        rules: Corners of an outline, and what is refused.

    Raises:
        MediaError: A box lies outside its picture; a mask is missing, damaged, of another size than its picture, or its instances are not
            those of its labels.
    """
    return [
        _boxes(part, views[part.data["image"]]) if part.type == "boxes" else _outlines(part, media, views[part.data["image"]], rules)
        for part in _parts(messages)
    ]


def check_boxes(parts: Sequence[Part], views: Sequence[PictureView]) -> None:
    """Refuse boxes that lie outside their pictures.

    Raises:
        MediaError: One does.
    """
    for part in parts:
        if part.type == "boxes":
            _boxes(part, views[part.data["image"]])


def read_masks(parts: Sequence[Part], media: Mapping[str, bytes], views: Sequence[PictureView], rules: MediaRules) -> dict[str, np.ndarray]:
    """Member -> the `instance_map` of each mask part.

    Raises:
        MediaError: As `instance_map`.
    """
    return {part.member: instance_map(part, media, views[part.data["image"]], rules) for part in parts if part.type == "mask"}


def instance_map(part: Part, media: Mapping[str, bytes], view: PictureView, rules: MediaRules) -> np.ndarray:
    """int32[H, W] of a mask part over its source picture, the value k where instance k is.

    Raises:
        MediaError: The mask is missing, damaged, of another size than its picture, or its instances are not those of its labels.
    """
    mask, labels = _decoded(part, media, rules), part.data["labels"]
    if mask.shape != (view.height, view.width):
        raise MediaError(f"mask {part.member} has {mask.shape[1]} x {mask.shape[0]} pixels, its picture {view.width} x {view.height}")
    if mask.max(initial=0) > len(labels):
        raise MediaError(f"mask {part.member} holds instance {mask.max()}, and {len(labels)} labels; label every instance")
    return mask


def _parts(messages: Sequence[Message]) -> list[Part]:
    return [part for message in messages for part in message.content if part.type in ("boxes", "mask")]


def _boxes(part: Part, view: PictureView) -> list[Shape]:
    for number, box in enumerate(part.data["boxes"]):
        if box["xyxy"][2] > view.width or box["xyxy"][3] > view.height:
            raise MediaError(f"box {number} ({box['label']}) is {box['xyxy']}, outside its picture of {view.width} x {view.height} pixels")
    return [seen_box(box["label"], box["xyxy"], view) for box in part.data["boxes"]]


def _outlines(part: Part, media: Mapping[str, bytes], view: PictureView, rules: MediaRules) -> list[Shape]:
    mask, labels = instance_map(part, media, view, rules), part.data["labels"]
    return [_outline(label, mask == number, view, rules.outline_points) for number, label in enumerate(labels, 1)]


def _outline(label: str, pixels: np.ndarray, view: PictureView, num_points: int) -> Shape:
    if not pixels.any():
        # Others hide it wholly.
        return Shape(label, (_NOWHERE,) * num_points, is_visible=False)
    return seen_outline(label, outline(pixels, num_points), view)


def _decoded(part: Part, media: Mapping[str, bytes], rules: MediaRules) -> np.ndarray:
    if part.member not in media:
        raise MediaError(f"mask {part.member} is missing")
    return decode_mask(media[part.member], rules.limits)
