"""Digits scattered over a canvas: pictures enough to learn how a place is said, which two hundred photographs are too few for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.shared_tables import DIGITS, Command, digit_pictures

_CANVAS = 64
_DIGIT = 28
_CANVASES = {"train": 10_000, "test": 500}
_TRIES = 20


def digit_places(data: Path, scratch: Path) -> Iterator[Command]:
    """One digit or two at random places of a canvas, in boxes around their ink; canvases of the test split hold test digits."""
    for split, found in digit_pictures(data, scratch).items():
        order = random.Random(0)
        digits = _in_turn(found, order)
        images, annotations = [], []
        for number in range(_CANVASES[split]):
            canvas = Image.new("L", (_CANVAS, _CANVAS))
            for left, top in _corners(order):
                name, digit = next(digits)
                with Image.open(scratch / name) as picture:
                    canvas.paste(picture, (left, top))
                    x1, y1, x2, y2 = picture.getbbox()
                box = [left + x1, top + y1, x2 - x1, y2 - y1]
                annotations.append({"id": len(annotations), "image_id": number, "category_id": digit + 1, "bbox": box})
            images.append({"id": number, "file_name": f"{split}-canvas-{number:05}.png", "width": _CANVAS, "height": _CANVAS})
            canvas.save(scratch / images[-1]["file_name"])
        categories = [{"id": digit + 1, "name": name} for digit, name in enumerate(DIGITS)]
        path = scratch / f"{split}.json"
        path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
        yield "coco", path, "--root", scratch, "--split", split, "--prompt", "Find every digit."


def _in_turn(found: Sequence[tuple[str, int]], order: random.Random) -> Iterator[tuple[str, int]]:
    while True:
        yield from order.sample(found, len(found))


def _corners(order: random.Random) -> list[tuple[int, int]]:
    """Top left corners of one digit, or of two that do not overlap where a place for the second is found."""
    last = _CANVAS - _DIGIT
    first, *others = [(order.randint(0, last), order.randint(0, last)) for _ in range(_TRIES)]
    beside = [one for one in others if max(abs(one[0] - first[0]), abs(one[1] - first[1])) >= _DIGIT]
    return [first, *beside[:1]] if order.random() < 0.5 else [first]
