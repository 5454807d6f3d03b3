"""Places in a picture: in source pixels, and in the unit square of what the model sees of it.

A model names places as shares of its view's width and height, so that they mean the same at every resolution; every change that
training makes to a picture is part of the view, and undone by its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Affine:
    """The map (x, y) -> (a x + b y + c, d x + e y + f)."""

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 1.0
    f: float = 0.0

    def __call__(self, point: Point) -> Point:
        """Where a point goes."""
        x, y = point
        return self.a * x + self.b * y + self.c, self.d * x + self.e * y + self.f

    def then(self, after: Affine) -> Affine:
        """The map that applies this one first and `after` to its result."""
        return Affine(
            after.a * self.a + after.b * self.d,
            after.a * self.b + after.b * self.e,
            after.a * self.c + after.b * self.f + after.c,
            after.d * self.a + after.e * self.d,
            after.d * self.b + after.e * self.e,
            after.d * self.c + after.e * self.f + after.f,
        )

    def inverse(self) -> Affine:
        """The map back.

        Raises:
            ZeroDivisionError: It maps the plane onto a line.
        """
        area = self.a * self.e - self.b * self.d
        a, b, d, e = self.e / area, -self.b / area, -self.d / area, self.a / area
        return Affine(a, b, -(a * self.c + b * self.f), d, e, -(d * self.c + e * self.f))

    @classmethod
    def scale(cls, x: float, y: float) -> Affine:
        """Each coordinate times its factor."""
        return cls(a=x, e=y)

    @classmethod
    def shift(cls, x: float, y: float) -> Affine:
        """Each coordinate plus its summand."""
        return cls(c=x, f=y)


@dataclass(frozen=True, slots=True)
class PictureView:
    """What the model sees of a picture.

    Attributes:
        width: Of the source picture in pixels, upright.
        height: Likewise.
        to_view: From source pixels to shares of the view, whose corners are (0, 0) and (1, 1).
    """

    width: int
    height: int
    to_view: Affine

    @classmethod
    def whole(cls, width: int, height: int) -> PictureView:
        """The picture as it is."""
        return cls(width, height, Affine.scale(1 / width, 1 / height))

    def source(self, point: Point) -> Point:
        """The source pixel coordinates of a point of the view, kept inside the picture."""
        x, y = self.to_view.inverse()(point)
        return min(max(x, 0.0), float(self.width)), min(max(y, 0.0), float(self.height))


@dataclass(frozen=True, slots=True)
class Shape:
    """A labelled box or outline in shares of a view.

    Attributes:
        label: What it is.
        points: Two opposite corners, top left first, of a box; the corners of an outline in their order.
        is_visible: False where nothing of it is in the view.
        score: Confidence in [0, 1].
    """

    label: str
    points: tuple[Point, ...]
    is_visible: bool = True
    score: float = 1.0

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


LEAST_VISIBLE = 0.2
"""Share of a box's area that must be in the view for it to count as seen."""


def seen_box(label: str, xyxy: Sequence[float], view: PictureView) -> Shape:
    """A box of the source picture as it lies in a view: the box around its corners there, cut off at the view's border."""
    left, top, right, bottom = xyxy
    corners = [view.to_view(corner) for corner in ((left, top), (right, top), (right, bottom), (left, bottom))]
    whole = Shape(label, tuple(corners)).bounds
    cut = [min(max(value, 0.0), 1.0) for value in whole]
    is_visible = _area(cut) > LEAST_VISIBLE * _area(whole)
    return Shape(label, ((cut[0], cut[1]), (cut[2], cut[3])), is_visible)


def seen_outline(label: str, points: Sequence[Point], view: PictureView) -> Shape:
    """An outline of the source picture as it lies in a view, its corners kept inside; seen where its middle is."""
    moved = [view.to_view(point) for point in points]
    middle = math.fsum(x for x, _ in moved) / len(moved), math.fsum(y for _, y in moved) / len(moved)
    kept = tuple((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)) for x, y in moved)
    return Shape(label, kept, all(0 <= value <= 1 for value in middle))


def _area(bounds: Sequence[float]) -> float:
    return max(0.0, bounds[2] - bounds[0]) * max(0.0, bounds[3] - bounds[1])
