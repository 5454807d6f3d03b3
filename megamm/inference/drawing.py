"""Answers drawn over the pictures that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megamm.config import Head
from megamm.core.errors import DataError
from megamm.core.masks import pixels_of
from megamm.core.predictions import LIKELY, Instance
from megamm.tasks.reply import Reply

if TYPE_CHECKING:
    from PIL import Image

# Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (240, 228, 66))
_MASK_SHARE = 0.45
Colour = tuple[int, int, int]


def draw_reply(
    picture: Image.Image, reply: Reply, *, longest_side: int | None = None, colours: dict[str, Colour] | None = None
) -> Image.Image:
    """A copy of a picture with the boxes and instances of an answer, a colour a label, scores below 1 beside the label.

    Args:
        picture: RGB, in source pixels.
        reply: Of the same picture.
        longest_side: Of the copy in pixels; None for the picture's own.
        colours: Of the labels of a series of pictures; labels that it lacks are added. None where the picture stands alone.
    """
    from PIL import Image, ImageDraw, ImageFont

    colours = {} if colours is None else colours
    for label in sorted({one.label for one in (*reply.boxes, *reply.instances)} - colours.keys()):
        colours[label] = _COLOURS[len(colours) % len(_COLOURS)]
    scale = 1.0 if longest_side is None else longest_side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    values = np.asarray(picture.convert("RGB").resize(size)).astype(np.float32)
    for number, one in enumerate(reply.instances):
        # Neighbours of one label are told apart by how light they are.
        colour = np.array(colours[one.label]) * (1.0 - 0.25 * (number % 3))
        pixels = np.asarray(Image.fromarray(pixels_of(one.counts, one.size)).resize(size, Image.Resampling.NEAREST))
        values[pixels] = (1 - _MASK_SHARE) * values[pixels] + _MASK_SHARE * colour
    drawn = Image.fromarray(values.round().astype(np.uint8))
    canvas, font = ImageDraw.Draw(drawn), ImageFont.load_default(max(8, size[1] // 32))
    width = max(1, size[1] // 200)
    for box in reply.boxes:
        x1, y1, x2, y2 = (scale * edge for edge in box.xyxy)
        # Half-open, and at least one pixel wide and high.
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colours[box.label], width=width)
        words = box.label if box.score >= 1 else f"{box.label} {box.score:.2f}"
        place = (x1 + width + 1, y1 + width)
        canvas.rectangle(canvas.textbbox(place, words, font=font), fill=colours[box.label])
        canvas.text(place, words, fill=(255, 255, 255), font=font)
    return drawn


def least_drawn(head: Head | None) -> float:
    """Least score of what is drawn of a model's answers: a head finds something at every query, tokens name what the model chose to say."""
    return 0.0 if head is None else LIKELY


def instance_map(instances: Sequence[Instance]) -> Image.Image:
    """Where each instance is, 16 bits a pixel: 0 for none, n for the n-th, of several the last. `mask` parts of samples are such files.

    Args:
        instances: Of one picture, at least one.

    Raises:
        DataError: There are more than 16 bits can number.
    """
    from PIL import Image

    most = np.iinfo(np.uint16).max
    if len(instances) > most:
        raise DataError(f"{len(instances)} instances are more than the {most} of a map of 16 bits; take them from the JSON")
    numbers = np.zeros(instances[0].size, dtype=np.uint16)
    for number, one in enumerate(instances, 1):
        numbers[pixels_of(one.counts, one.size)] = number
    return Image.fromarray(numbers)
