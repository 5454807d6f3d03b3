"""Tables of plain text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def aligned(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table: whole numbers with separators and to the right, everything else to the left."""
    lines = [list(header), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    sides = [str.rjust if is_number else str.ljust for is_number in _are_numbers(header, rows)]
    return ["  ".join(side(cell, width) for cell, width, side in zip(line, widths, sides, strict=True)).rstrip() for line in lines]


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table in Markdown; numbers as `aligned` writes them, texts on one line."""
    return [
        f"| {' | '.join(header)} |",
        f"|{'|'.join('---:' if is_number else '---' for is_number in _are_numbers(header, rows))}|",
        *(f"| {' | '.join(' '.join(_text(cell).split()).replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def _are_numbers(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[bool]:
    return [bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(header))]


def _text(cell: Any) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return str(cell)
