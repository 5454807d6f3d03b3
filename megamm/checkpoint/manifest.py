"""The manifest: what a checkpoint holds, and the proof that it is whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import megamm
from megamm.checkpoint.base import Base, folder_digest, weight_files
from megamm.checkpoint.fence import Fence, check_fence
from megamm.checkpoint.seal import opened, sealed
from megamm.core.errors import CheckpointError
from megamm.core.files import canonical_json, digest_file, digest_text

FORMAT = 5
_PAUSES_SECONDS = (0.5, 2.0)
MANIFEST = "manifest.json"
DATA_STATE = "data_state.json"
LEDGER = "ledger.jsonl"
_PREFIX = "step_"
_SOFTWARE = ("megamm", "torch", "deepspeed", "transformers", "safetensors", "numpy")


class OtherFormat(CheckpointError):
    """A checkpoint that another version of this package wrote: not damaged, but nothing that this one can read."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a manifest says of a file: its size in bytes and its xxh3-128 in hexadecimal."""

    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """One parameter or persistent buffer: name, whole shape, stored dtype, and `trainable`, `followed`, `frozen`, `buffer` or `base`.

    What is `followed` trains, and has averages beside its moments; what is `base` is frozen and lies where the run started from: the
    checkpoint holds nothing of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that loading must know before it opens another file.

    Attributes:
        step: Optimizer steps that were run.
        world_size: Ranks that wrote it.
        files: File name -> size and digest, of every file but the manifest.
        parameters: In the model's order, buffers last.
        engine: Counters of the engine (`engine.partitions.counters`).
        fingerprints: Name (`model`, `config`, `data`, ...) -> digest.
        software: Package -> version.
        fence: Who wrote it.
        slices: Trainable parameter -> [rank, first, one past the last] of the flattened parameter, rank after rank, as ZeRO-1 and
            ZeRO-2 cut it; what is not named is cut evenly (`slicing`).
        num_tokens: Real tokens that were trained on so far.
        base: The weights that this checkpoint stands on; None where it holds all of them.
    """

    step: int
    world_size: int
    files: dict[str, FileFacts]
    parameters: tuple[ParameterEntry, ...]
    engine: dict[str, Any]
    fingerprints: dict[str, str] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    fence: Fence = field(default_factory=Fence)
    slices: dict[str, list[list[int]]] = field(default_factory=dict)
    num_tokens: int = 0
    base: Base | None = None

    def to_text(self) -> str:
        """JSON with a digest of itself, so that a flipped bit in the manifest is found as well."""
        return sealed({"format": FORMAT, **dataclasses.asdict(self)})


def rank_file(rank: int) -> str:
    """Name of a rank's shard."""
    return f"rank_{rank:05d}.safetensors"


def step_folder(step: int) -> str:
    """Name of a step's folder; names sort as steps do."""
    return f"{_PREFIX}{step:08d}"


def aside(path: Path, why: str) -> Path:
    """A free name beside a checkpoint under which it is kept but never read: `step_00000100.damaged-1`."""
    numbers = itertools.count(1)
    return next(free for free in (path.with_name(f"{path.name}.{why}-{number}") for number in numbers) if not free.exists())


def kept_aside(folder: Path) -> list[str]:
    """Names that `aside` gave."""
    return sorted(path.name for path in folder.glob(f"{_PREFIX}*.*-*")) if folder.is_dir() else []


def committed(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that carries a checkpoint's name, oldest first; whether it is good is not asked."""
    if not folder.is_dir():
        return []
    found = [(_step_of(path.name), path) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted((step, path) for step, path in found if step is not None)


def _step_of(name: str) -> int | None:
    """The step that a folder is named after; None for what was set aside and for what is no checkpoint."""
    number = name.removeprefix(_PREFIX)
    return int(number) if number != name and number.isdecimal() else None


def model_digest(parameters: Iterable[ParameterEntry]) -> str:
    """Digest of names, shapes and kinds: equal for what a checkpoint can be loaded into."""
    return digest_text(canonical_json([[entry.name, list(entry.shape), entry.kind] for entry in parameters]))


def software_versions() -> dict[str, str]:
    """Versions of what can change numbers."""
    return {name: metadata.version(name) for name in _SOFTWARE} | {"python": platform.python_version()}


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check its own digest.

    Raises:
        OtherFormat: Another version of this package wrote it.
        CheckpointError: It is missing or damaged, or does not name the files that its number of ranks writes.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist; name a step_... folder of the run's checkpoints")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder} has no {MANIFEST}: it was never committed; use another one")
    try:
        body = opened(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} cannot be read ({error.strerror}); use another one") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged ({error}); use another one") from None
    if (number := body.pop("format", None)) != FORMAT:
        software = body.get("software")
        wrote = software.get("megamm", "another version") if isinstance(software, dict) else "another version"
        raise OtherFormat(
            f"checkpoint {folder} has format {number}, megamm {megamm.__version__} reads {FORMAT}; load it with megamm {wrote}"
        )
    try:
        manifest = _manifest_of(body)
        expected = {DATA_STATE, LEDGER, *map(rank_file, range(manifest.world_size))}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {MANIFEST} holds something else ({type(error).__name__}: {error}); use another one"
        ) from None
    if odd := expected ^ manifest.files.keys():
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} of {manifest.world_size} ranks is wrong about {min(odd)}; use another one")
    if _step_of(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"checkpoint {folder} is of step {manifest.step}, by its {MANIFEST}; rename it {step_folder(manifest.step)}")
    return manifest


def _manifest_of(body: dict[str, Any]) -> Manifest:
    files = {name: FileFacts(**facts) for name, facts in body["files"].items()}
    parameters = tuple(ParameterEntry(**entry | {"shape": tuple(entry["shape"])}) for entry in body["parameters"])
    base = None if body.get("base") is None else Base(**body["base"])
    return Manifest(**body | {"files": files, "parameters": parameters, "fence": Fence(**body["fence"]), "base": base})


def check_file(folder: Path, name: str, facts: FileFacts, *, from_disk: bool = False) -> None:
    """Compare one file with what the manifest says of it.

    Args:
        folder: The checkpoint.
        name: A file of it.
        facts: What the manifest says.
        from_disk: Let go of what memory holds of it first, so that the disk answers (where the system knows how to).

    Raises:
        CheckpointError: It is missing, of another size, or its bytes changed.
    """
    num_bytes, digest = _read_file(folder, name, from_disk)
    if num_bytes != facts.num_bytes:
        raise CheckpointError(f"checkpoint {folder}: {name} has {num_bytes} bytes, the manifest says {facts.num_bytes}")
    if digest != facts.digest:
        raise CheckpointError(f"checkpoint {folder}: {name} is damaged (its digest does not match the manifest)")


def _read_file(folder: Path, name: str, from_disk: bool) -> tuple[int, str]:
    """Size and digest of a file of a checkpoint.

    A server that stumbles once must not cost a run its newest checkpoint; what is not there is not looked for again.
    """
    pauses_seconds = list(_PAUSES_SECONDS)
    while True:
        try:
            if from_disk:
                _forget(folder / name)
            return (folder / name).stat().st_size, digest_file(folder / name)
        except OSError as error:
            if not pauses_seconds or isinstance(error, FileNotFoundError):
                raise CheckpointError(f"checkpoint {folder}: {name} cannot be read ({error.strerror})") from error
            time.sleep(pauses_seconds.pop(0))


def _forget(path: Path) -> None:
    """Drop a synced file from the page cache: what was just written would be read from memory, whatever the disk holds."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_data_state(folder: Path) -> dict[str, Any]:
    """Where the data plan stood.

    Raises:
        CheckpointError: The file is no JSON.
    """
    with _is_json(folder, DATA_STATE) as data:
        return json.loads(data)


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Samples that were skipped until then.

    Raises:
        CheckpointError: A line is no JSON.
    """
    with _is_json(folder, LEDGER) as data:
        return [json.loads(line) for line in data.splitlines()]


@contextmanager
def _is_json(folder: Path, name: str) -> Iterator[bytes]:
    try:
        yield (folder / name).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder}: {name} cannot be read ({error}); use another one") from error


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint, and of the weights that it stands on, and compare it with the manifest.

    Raises:
        CheckpointError: Anything is missing or damaged (names the file), or it was written by an owner that had lost the run.
    """
    manifest = read_manifest(folder)
    check_fence(folder, manifest.fence, manifest.step)
    for name, facts in sorted(manifest.files.items()):
        check_file(folder, name, facts)
    if manifest.base is not None:
        check_base(manifest.base)
    return manifest


def check_base(base: Base) -> None:
    """Read every byte of the weights that a checkpoint stands on.

    Raises:
        CheckpointError: They are missing, damaged, or others than those.
    """
    path = Path(base.path)
    if not path.is_dir():
        raise CheckpointError(f"{path}, whose weights this checkpoint stands on, is not there; put it back, or train from another start")
    try:
        if (path / MANIFEST).is_file():
            verify(path)
            found = digest_file(path / MANIFEST)
        else:
            found = folder_digest({name: digest_file(path / name) for name in weight_files(path)})
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read ({error.strerror})") from error
    require_digest(base, found)


def require_digest(base: Base, found: str) -> None:
    """Refuse weights in the base's place that are not the base.

    Raises:
        CheckpointError: The digests differ.
    """
    if found != base.digest:
        raise CheckpointError(
            f"{base.path} holds other weights ({found}) than those that the adapter was trained on ({base.digest}); put these back there"
        )
