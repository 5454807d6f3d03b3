"""Preparing small inputs and reading back what was written, as any tar reader would."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamm.data.shards.arrays import map_arrays
from megamm.data.shards.index import load_index
from megamm.prepare import SOURCES
from megamm.prepare.plan import Limits, Splitting
from megamm.prepare.report import SplitReport
from megamm.prepare.run import Job, prepare


def write_shards(source: str, output: Path, *, job: dict[str, Any] | None = None, **options: Any) -> list[SplitReport]:
    """`megamm prepare`, in this process unless `job` asks for workers; skipped records are no error unless `job` says so."""
    settings = {"max_skipped": 1.0, **(job or {})}
    splitting = Splitting(**{name: settings.pop(name) for name in ("default", "test_share", "test_names", "seed") if name in settings})
    limits = Limits(**{name: settings.pop(name) for name in ("num_samples", "num_bytes") if name in settings})
    return prepare(SOURCES[source], Job(output, splitting, limits, **settings), **options)


def samples(output: Path, split: str = "train") -> dict[str, tuple[dict[str, Any], dict[str, bytes]]]:
    """Key -> document and media of a split, in the order of its shards; every shard is checked against its index."""
    found = {}
    for path in sorted(output.glob(f"{split}-*.tar")):
        assert load_index(path, verify_digest=True).problems == {}
        for key, files in _by_key(path):
            document = json.loads(files.pop("json"))
            found[key] = document, files
    return found


def files(output: Path) -> dict[str, bytes]:
    """All visible files of a folder, by name; of an index its digest, because safetensors orders its own header by chance."""
    paths = [path for path in sorted(output.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return {path.name: map_arrays(path).digest.encode() if path.suffix == ".index" else path.read_bytes() for path in paths}


def omitted(output: Path, split: str = "train") -> list[tuple[str, str, str]]:
    """Key, what and why of everything that is not in the shards of a split."""
    path = output / f"{split}-skipped.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(line["key"], line["omitted"], line["reason"]) for line in map(json.loads, lines)]


def text_of(document: dict[str, Any], message: int = -1) -> str:
    """The text of a message, parts joined."""
    return "".join(part.get("text", "") for part in document["messages"][message]["content"])


def _by_key(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    with tarfile.open(path) as tar:
        key, found = "", dict[str, bytes]()
        for member in tar:
            name, _, suffix = member.name.rpartition("/")[2].partition(".")
            prefix = member.name[: len(member.name) - len(suffix) - 1]
            if found and prefix != key:
                yield key, found
                found = {}
            key = prefix
            content = tar.extractfile(member)
            assert name
            assert content
            found[suffix] = content.read()
        if found:
            yield key, found
