"""Instances of a mask as outlines of a fixed number of corners, and outlines as sets of pixels.

Legend: H, W pixels of the picture. Coordinates are those of pixel corners: pixel (row 0, column 0) is the square from (0, 0) to (1, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megamm.core.geometry import Point

# Steps along pixel corners: right, down, left, up, each with the pixel that must be set to the right of it, as (row, column) offsets.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
_RIGHT_OF = ((0, 0), (0, -1), (-1, -1), (-1, 0))


def outline(pixels_HW: np.ndarray, num_points: int) -> tuple[Point, ...]:
    """Points at equal distances along the border of a set of pixels, clockwise, from its topmost row's left corner on.

    Of a set in several pieces the largest border that begins a topmost-leftmost piece counts: the one with the longest way round.

    Args:
        pixels_HW: bool[H, W], at least one of them set.
        num_points: At least 3.

    Raises:
        ValueError: No pixel is set, or fewer than 3 points are asked for.
    """
    if num_points < 3:
        raise ValueError(f"num_points={num_points}: an outline takes 3 or more")
    rows, columns = np.nonzero(pixels_HW)
    if not len(rows):
        raise ValueError("no pixel is set, so there is nothing to go round")
    top, left = int(rows.min()), int(columns.min())
    # A margin, so that looking beside the border never leaves the array.
    crop = np.pad(pixels_HW[top : rows.max() + 1, left : columns.max() + 1], 1)
    corners = max(_borders(crop), key=len)
    way = np.add([*corners, corners[0]], (left - 1.0, top - 1.0))
    places = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(way, axis=0)).sum(axis=1))])
    wanted = np.arange(num_points) * places[-1] / num_points
    return tuple(zip(np.interp(wanted, places, way[:, 0]).tolist(), np.interp(wanted, places, way[:, 1]).tolist(), strict=True))


def fill(points: Sequence[Point], width: int, height: int) -> np.ndarray:
    """bool[H, W]: the pixels whose middle lies inside an outline (even-odd rule)."""
    inside = np.zeros((height, width), dtype=bool)
    xs, ys = np.array([point[0] for point in points]), np.array([point[1] for point in points])
    next_xs, next_ys = np.roll(xs, -1), np.roll(ys, -1)
    first, last = max(0, int(np.floor(ys.min()))), min(height, int(np.ceil(ys.max())))
    middles = np.arange(width) + 0.5
    for row in range(first, last):
        y = row + 0.5
        crossed = (ys <= y) != (next_ys <= y)
        if crossed.any():
            at = xs[crossed] + (y - ys[crossed]) / (next_ys[crossed] - ys[crossed]) * (next_xs[crossed] - xs[crossed])
            inside[row] = (middles[:, None] > at[None]).sum(axis=1) % 2 == 1
    return inside


def run_lengths(pixels_HW: np.ndarray) -> tuple[int, ...]:
    """COCO's uncompressed RLE: lengths of runs of 0, 1, 0, … down the columns, the first of them of 0 and maybe 0 long."""
    flat = np.asarray(pixels_HW, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return tuple([0, *lengths] if flat.size and flat[0] else lengths)


def pixels_of(counts: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """bool[H, W] of run lengths: the inverse of `run_lengths`.

    Args:
        counts: Lengths of runs.
        size: H and W.

    Raises:
        ValueError: The runs are not of so many pixels.
    """
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"runs of {sum(counts)} pixels for a mask of {size[0]} x {size[1]}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size, order="F")


def _borders(pixels: np.ndarray) -> list[list[tuple[int, int]]]:
    """The outer border of each piece, as corners (x, y) one pixel apart, clockwise, from its topmost, then leftmost pixel's corner on.

    Pieces that touch at a corner alone are two.
    """
    seen = np.zeros_like(pixels)
    borders = []
    # A pixel with nothing above whose upper edge no border has used begins a border, a hole's too; holes go anticlockwise and are dropped.
    for row, column in np.add(np.argwhere(pixels[1:-1] & ~pixels[:-2]), (1, 0)):
        if seen[row, column]:
            continue
        corners, twice_area, x, y, heading = [], 0, int(column), int(row), 0
        while True:
            corners.append((x, y))
            if heading == 0:
                seen[y, x] = True
            step = _STEPS[heading]
            twice_area += x * (y + step[1]) - (x + step[0]) * y
            x, y = x + step[0], y + step[1]
            # Turn right where the pixel ahead to the right is not set, left where the one ahead to the left is, else go on.
            for turn in (1, 0, -1):
                new = (heading + turn) % 4
                below, beside = _RIGHT_OF[new]
                across, over = _RIGHT_OF[(new + 3) % 4]
                if pixels[y + below, x + beside] and not pixels[y + across, x + over]:
                    heading = new
                    break
            if (x, y) == corners[0] and heading == 0:
                break
        if twice_area > 0:
            borders.append(corners)
    return borders
