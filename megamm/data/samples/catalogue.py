"""What opening a dataset needs to know of all its shards, in one file: a hundred thousand headers are slow to read one by one.

A catalogue only repeats what sidecars say. It is believed as long as every shard has the size and time of change that it had
when the catalogue was written, and every sidecar is there; whoever wants to know more of a shard reads its sidecars, which carry
digests of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm.core.files import digest_text
from megamm.core.logging import get_logger
from megamm.data.shards.arrays import map_arrays, write_arrays
from megamm.data.shards.places import Shard, sidecar_path

CATALOGUE_VERSION = 1
MIN_SHARDS = 256
"""Of fewer shards the headers are read in no time, and no catalogue is written."""
_DIGEST_DIGITS = 32

_log = get_logger("data")


@dataclass(frozen=True)
class Catalogue:
    """The shards of a dataset, in order. Legend: S shards.

    Attributes:
        num_samples: int64[S].
        digests: Of each shard, 32 hexadecimal digits.
        lengths_digests: Of each shard's planned lengths.
        task_names: Sorted names of the tasks that occur.
        num_tokens: Of all samples.
        num_problems: Samples that cannot be used.
    """

    num_samples: np.ndarray
    digests: list[str]
    lengths_digests: list[str]
    task_names: tuple[str, ...]
    num_tokens: int
    num_problems: int


def read_catalogue(tars: Sequence[Shard], key: str, versions: Sequence[int]) -> Catalogue | None:
    """The catalogue of a dataset; None where there is none, or it is not true any more.

    Args:
        tars: All shards, in the dataset's order.
        key: Settings of the planned lengths.
        versions: Of the formats of the sidecars.
    """
    path = _path(tars[0], key)
    if len(tars) < MIN_SHARDS or not path.exists():
        return None
    try:
        file = map_arrays(path)
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be used (%s); it is made anew", path, error)
        return None
    facts = file.facts
    if facts["stated"] != _stated(tars, key, versions) or not _has_sidecars(tars, key):
        return None
    if not np.array_equal(file.arrays["states"], _states(tars)):
        return None
    return Catalogue(
        num_samples=file.arrays["num_samples"],
        digests=_digits(file.arrays["digests"]),
        lengths_digests=_digits(file.arrays["lengths_digests"]),
        task_names=tuple(facts["task_names"]),
        num_tokens=facts["num_tokens"],
        num_problems=facts["num_problems"],
    )


def write_catalogue(tars: Sequence[Shard], key: str, versions: Sequence[int], catalogue: Catalogue) -> None:
    """Write the catalogue of a dataset that is large enough for one; where a folder cannot be written to, opening stays slow.

    Args:
        tars: All shards, in the dataset's order.
        key: Settings of the planned lengths.
        versions: Of the formats of the sidecars.
        catalogue: What the sidecars say now.
    """
    if len(tars) < MIN_SHARDS:
        return
    arrays = {
        "states": _states(tars),
        "num_samples": catalogue.num_samples,
        "digests": np.frombuffer(bytes.fromhex("".join(catalogue.digests)), dtype=np.uint8),
        "lengths_digests": np.frombuffer(bytes.fromhex("".join(catalogue.lengths_digests)), dtype=np.uint8),
    }
    facts = {
        "stated": _stated(tars, key, versions),
        "task_names": list(catalogue.task_names),
        "num_tokens": catalogue.num_tokens,
        "num_problems": catalogue.num_problems,
    }
    path = _path(tars[0], key)
    try:
        write_arrays(path, arrays, facts)
    except OSError as error:
        _log.info("%s cannot be written (%s): opening reads the headers of %d shards", path, error, len(tars))


def _path(first: Shard, key: str) -> Path:
    return sidecar_path(first, f".catalogue-{key}")


def _stated(tars: Sequence[Shard], key: str, versions: Sequence[int]) -> list[Any]:
    return [CATALOGUE_VERSION, list(versions), key, len(tars), digest_text("\n".join(map(str, tars)))]


def _states(tars: Sequence[Shard]) -> np.ndarray:
    """int64[S, 2], size and time of change in ns of each shard; of remote ones of their index, which only we write."""
    states = []
    for tar in tars:
        try:
            # Of very many files every microsecond counts: Path.stat takes longer.
            status = os.stat(str(tar) if isinstance(tar, Path) else sidecar_path(tar, ".index"))  # noqa: PTH116
            states.append((status.st_size, status.st_mtime_ns))
        except OSError:
            states.append((-1, -1))
    return np.array(states, dtype=np.int64)


def _has_sidecars(tars: Sequence[Shard], key: str) -> bool:
    """Whether all indexes and lengths are there, by listing their folders."""
    # Strings, because taking a hundred thousand Paths apart takes longer than all the rest.
    wanted: dict[str, list[str]] = {}
    for tar in tars:
        folder, _, name = (str(tar) if isinstance(tar, Path) else str(sidecar_path(tar, ""))).rpartition("/")
        wanted.setdefault(folder, []).append(name)
    for folder, names in wanted.items():
        there = set(os.listdir(folder or "."))  # noqa: PTH208, names are wanted and no Paths
        if not there.issuperset([f"{name}.index" for name in names]) or not there.issuperset([f"{name}.lengths-{key}" for name in names]):
            return False
    return True


def _digits(digests: np.ndarray) -> list[str]:
    text = digests.tobytes().hex()
    return [text[start : start + _DIGEST_DIGITS] for start in range(0, len(text), _DIGEST_DIGITS)]
