"""Tables and lists that bring the real test data into a form that commands read, and the splits that its README states."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Command = Sequence[object]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SKIN_TONES = re.compile(r"_1f3f[b-f]")


def digit_pictures(data: Path, scratch: Path) -> dict[str, list[tuple[str, int]]]:
    """Unpack the IDX files of mnist12k: of each split the names of the pictures, written to `scratch`, and their digits."""
    found = {}
    for split in ("train", "test"):
        pictures = np.frombuffer(gzip.decompress((data / f"{split}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
        labels = np.frombuffer(gzip.decompress((data / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        names = [f"{split}-{number:05}.png" for number in range(len(labels))]
        for name, picture in zip(names, pictures.reshape(-1, 28, 28), strict=True):
            Image.fromarray(picture).save(scratch / name)
        found[split] = list(zip(names, labels.tolist(), strict=True))
    return found


def official_split(take: int) -> str:
    """Of fsdd: takes 0 to 4 of each speaker and digit are the official test."""
    return "test" if take < 5 else "train"


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows, one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tsv(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    """Write rows with tabs between their values."""
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def unpacked(path: Path) -> str:
    """The text of a gzipped UTF-8 file."""
    return gzip.decompress(path.read_bytes()).decode()


def without_held_out(rows: Sequence[Any], step: int, contents: Callable[[Any], Iterable[object]]) -> Iterator[tuple[int, Any, str]]:
    """Number, row and split, `test` for every `step`-th row; rows of train that have any of their contents in one of those are dropped."""
    numbered = [(number, row, every(number, step)) for number, row in enumerate(rows)]
    held_out = {content for _, row, split in numbered if split == "test" for content in contents(row)}
    yield from (one for one in numbered if one[2] == "test" or held_out.isdisjoint(contents(one[1])))


def every(number: int, step: int) -> str:
    """`test` for every `step`-th, counted from 1; else `train`."""
    return "test" if number % step == step - 1 else "train"
