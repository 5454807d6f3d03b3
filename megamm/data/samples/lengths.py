"""Planned lengths: what every sample of a shard will take of a row, so that planning opens no tar and no tokenizer.

A second sidecar beside the index, one for each pair of shard and settings (tokenizer, template, media rules, mapping, speeds).
A sample that can never be used has length 0 and a reason, so that it is planned as skipped instead of failing when its turn
comes. Augmentation that changes a length gives a sample several lengths, its variants, of which the planner draws one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np

from megamm.core.errors import DataError
from megamm.core.files import canonical_json, digest_text, sync_folder
from megamm.data.ledger import BadSample
from megamm.data.media.features import MediaRules
from megamm.data.samples.catalogue import Catalogue, read_catalogue, write_catalogue
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.mapping import OWN_FORM, SampleForm, read_sample
from megamm.data.shards.arrays import load_arrays, read_facts, write_arrays
from megamm.data.shards.index import INDEX_VERSION, ShardFacts, check_unchanged, load_index, read_shard_facts
from megamm.data.shards.places import Shard, sidecar_path
from megamm.data.shards.reader import LocalReader, Reader, ShardReader
from megamm.tokenizers.text import TextTokenizer

LENGTHS_VERSION = 4
ONE_SPEED = (1.0,)
IN_MEMORY_SAMPLES = 8_000_000
"""Larger datasets map one joined file instead of reading every shard's lengths."""
_MAX_REASON = 300
_NUM_OPENERS = 8
_VERSIONS = (INDEX_VERSION, LENGTHS_VERSION)


@dataclass(frozen=True)
class SampleLengths:
    """Planned lengths of one shard. Legend: N samples, V variants.

    Attributes:
        lengths: int32[N, V, 3], tokens, patches and frames; zeros for a sample that cannot be used.
        tasks: uint16[N] into `task_names`.
        task_names: Names of the tasks that occur.
        problems: Sample number -> why it cannot be used.
        digest: Of all of this and of the shard and settings that it belongs to; empty before it is written.
    """

    lengths: np.ndarray
    tasks: np.ndarray
    task_names: tuple[str, ...]
    problems: dict[int, str]
    digest: str = ""

    @property
    def tokens(self) -> np.ndarray:
        """int32[N], of the first variant."""
        return self.lengths[:, 0, 0]

    @property
    def patches(self) -> np.ndarray:
        """int32[N], of the first variant."""
        return self.lengths[:, 0, 1]

    @property
    def frames(self) -> np.ndarray:
        """int32[N], of the first variant."""
        return self.lengths[:, 0, 2]


@dataclass(frozen=True, slots=True)
class LengthsFacts:
    """What opening a dataset needs of each shard's lengths, read from the header alone; tokens are those of the first variant."""

    task_names: tuple[str, ...]
    digest: str
    num_tokens: int
    num_problems: int


def lengths_key(tokenizer: TextTokenizer, rules: MediaRules, *, form: SampleForm = OWN_FORM, speeds: Sequence[float] = ONE_SPEED) -> str:
    """Digest of everything besides the shard that a planned length depends on.

    Args:
        tokenizer: Of the run.
        rules: How media become tower inputs.
        form: What the dataset's members mean.
        speeds: At which its sounds are played (`Augment.audio_speeds`; held-out sounds are never changed).
    """
    return digest_text(canonical_json([LENGTHS_VERSION, tokenizer.fingerprint, rules.fingerprint, form.fingerprint, list(speeds)]))[:16]


def lengths_path(tar: Shard, key: str) -> Path:
    """Where the lengths of a shard under some settings lie."""
    return sidecar_path(tar, f".lengths-{key}")


def plan_lengths(
    tar: Shard,
    tokenizer: TextTokenizer,
    rules: MediaRules,
    *,
    form: SampleForm = OWN_FORM,
    speeds: Sequence[float] = ONE_SPEED,
    reader: Reader | None = None,
) -> SampleLengths:
    """Measure every sample of a shard from its texts and its media's headers; `reader` reads it, `LocalReader` by default.

    Raises:
        DataError: The shard or its index is missing, damaged or changed.
    """
    index, own = load_index(tar), LocalReader()
    shard, encoder = ShardReader(tar, index, reader or own), SampleEncoder(tokenizer, rules)
    lengths = np.zeros((index.num_samples, len(speeds), 3), dtype=np.int32)
    tasks = np.zeros(index.num_samples, dtype=np.uint16)
    task_numbers: dict[str, int] = {}
    problems: dict[int, str] = {}
    for number in range(index.num_samples):
        try:
            sample = read_sample(shard, number, form, media=False)
            sizes = encoder.measure(sample, index.media(number), speeds)
        except BadSample as error:
            # A member that nothing names may be rotten; where something names it, the index knows why.
            known = f"; {index.problems[number]}" if number in index.problems else ""
            problems[number] = f"{error}{known}"[:_MAX_REASON]
            continue
        lengths[number] = [(size.tokens, size.patches, size.frames) for size in sizes]
        tasks[number] = task_numbers.setdefault(sample.task, len(task_numbers))
    own.close()
    return SampleLengths(lengths, tasks, tuple(task_numbers), problems)


def write_lengths(
    tar: Shard,
    tokenizer: TextTokenizer,
    rules: MediaRules,
    *,
    form: SampleForm = OWN_FORM,
    speeds: Sequence[float] = ONE_SPEED,
    reader: Reader | None = None,
) -> SampleLengths:
    """`plan_lengths`, written where the shard's sidecars lie.

    Raises:
        DataError: As `plan_lengths`.
    """
    planned = plan_lengths(tar, tokenizer, rules, form=form, speeds=speeds, reader=reader)
    key = lengths_key(tokenizer, rules, form=form, speeds=speeds)
    facts = {
        "version": LENGTHS_VERSION,
        "key": key,
        "shard": read_shard_facts(tar).digest,
        "task_names": list(planned.task_names),
        "num_tokens": int(planned.tokens.sum(dtype=np.int64)),
        "num_problems": len(planned.problems),
        "problems": {str(number): reason for number, reason in planned.problems.items()},
    }
    digest = write_arrays(lengths_path(tar, key), {"lengths": planned.lengths, "tasks": planned.tasks}, facts)
    return SampleLengths(planned.lengths, planned.tasks, planned.task_names, planned.problems, digest)


def ensure_lengths(
    tars: Sequence[Shard],
    tokenizer: TextTokenizer,
    rules: MediaRules,
    *,
    form: SampleForm = OWN_FORM,
    speeds: Sequence[float] = ONE_SPEED,
    reader: Reader | None = None,
) -> list[Shard]:
    """Write what is missing or stale of a dataset's lengths; one process a file system should call this.

    Args:
        tars: All shards of the dataset, in its order.
        tokenizer: Of the run.
        rules: How media become tower inputs.
        form: What the dataset's members mean.
        speeds: At which its sounds are played.
        reader: Where bytes come from; local files by default.

    Returns:
        The shards whose lengths were written.

    Raises:
        DataError: As `plan_lengths`.
    """
    key = lengths_key(tokenizer, rules, form=form, speeds=speeds)
    if (known := read_catalogue(tars, key, _VERSIONS)) is not None and (
        known.num_samples.sum() <= IN_MEMORY_SAMPLES or _joined_path(tars, known.lengths_digests).exists()
    ):
        return []
    written, facts = [], []
    for tar in tars:
        shard = read_shard_facts(tar)
        try:
            lengths = read_lengths_facts(tar, key, shard)
        except DataError:
            write_lengths(tar, tokenizer, rules, form=form, speeds=speeds, reader=reader)
            written.append(tar)
            lengths = read_lengths_facts(tar, key, shard)
        check_unchanged(tar, shard)
        facts.append((shard, lengths))
    catalogue = _catalogue_of(facts)
    num_samples = int(catalogue.num_samples.sum())
    if num_samples > IN_MEMORY_SAMPLES and not (path := _joined_path(tars, catalogue.lengths_digests)).exists():
        _write_joined(path, tars, key, (num_samples, len(speeds), 3))
    write_catalogue(tars, key, _VERSIONS, catalogue)
    return written


def open_catalogue(tars: Sequence[Shard], key: str) -> Catalogue:
    """What the headers of all sidecars of a dataset say, from the catalogue that `ensure_lengths` left where that is still true.

    Args:
        tars: All shards of the dataset, in its order.
        key: Settings of the lengths.

    Raises:
        DataError: A shard is gone or changed, or a sidecar is missing, damaged or of another version of the shard.
    """
    return read_catalogue(tars, key, _VERSIONS) or _gather(tars, key)


def _gather(tars: Sequence[Shard], key: str) -> Catalogue:
    def of(tar: Shard) -> tuple[ShardFacts, LengthsFacts]:
        shard = read_shard_facts(tar)
        check_unchanged(tar, shard)
        return shard, read_lengths_facts(tar, key, shard)

    # Headers are tiny; on a shared file system waiting for them is all that this takes.
    with ThreadPoolExecutor(_NUM_OPENERS) as pool:
        return _catalogue_of(list(pool.map(of, tars)))


def _catalogue_of(facts: Sequence[tuple[ShardFacts, LengthsFacts]]) -> Catalogue:
    shards, lengths = zip(*facts, strict=True)
    return Catalogue(
        num_samples=np.array([one.num_samples for one in shards], dtype=np.int64),
        digests=[one.digest for one in shards],
        lengths_digests=[one.digest for one in lengths],
        task_names=tuple(sorted({task for one in lengths for task in one.task_names})),
        num_tokens=sum(one.num_tokens for one in lengths),
        num_problems=sum(one.num_problems for one in lengths),
    )


def joined_lengths(tars: Sequence[Shard], key: str, digests: Sequence[str], starts: np.ndarray, *, num_variants: int = 1) -> np.ndarray:
    """The lengths of all shards of a dataset as one array.

    Read into memory, or for large datasets mapped from the file that `ensure_lengths` joined, so that any sample of a
    billion is one access away and none is read before.

    Args:
        tars: Shards in the dataset's order.
        key: Settings of the lengths.
        digests: Of each shard's lengths.
        starts: int64[S + 1], number of the first sample of each shard.
        num_variants: Speeds of the dataset.

    Returns:
        int32[N, V, 3].

    Raises:
        DataError: Lengths are missing or damaged.
    """
    shape = (int(starts[-1]), num_variants, 3)
    if starts[-1] <= IN_MEMORY_SAMPLES:
        joined = np.empty(shape, dtype=np.int32)
        for tar, digest, low, high in zip(tars, digests, starts[:-1], starts[1:], strict=True):
            one = load_lengths(tar, key)
            if one.digest != digest:
                raise DataError(f"shard {tar}: {lengths_path(tar, key).name} changed since they were catalogued; delete it and {_FIX}")
            if len(one.lengths) != high - low:
                # Opening reads the header of an index without its digest; here a wrong number shows.
                raise DataError(
                    f"shard {tar}: {high - low} samples in its index, {len(one.lengths)} planned lengths; run `megamm data index {tar}`"
                )
            joined[low:high] = one.lengths
        return joined
    path = _joined_path(tars, digests)
    try:
        joined = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"dataset of shard {tars[0]}: {path.name} is missing; {_FIX}") from None
    except (ValueError, EOFError, SyntaxError, TokenError) as error:  # numpy reads its headers as Python
        raise DataError(f"dataset of shard {tars[0]}: {path.name} is damaged ({error}); delete it and {_FIX}") from None
    if joined.shape != shape or joined.dtype != np.int32:
        raise DataError(f"dataset of shard {tars[0]}: {path.name} has shape {joined.shape}, not {shape}; delete it and {_FIX}")
    return joined.view(np.ndarray)


def _joined_path(tars: Sequence[Shard], digests: Sequence[str]) -> Path:
    """Named by what it joins: a changed shard or another set of shards is another file."""
    return sidecar_path(tars[0], "").with_name(f"lengths-{digest_text(canonical_json(list(digests)))[:16]}.npy")


def _write_joined(path: Path, tars: Sequence[Shard], key: str, shape: tuple[int, int, int]) -> None:
    """Join shard after shard through a mapped file: memory does not grow with the dataset."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int32, shape=shape)
        start = 0
        for tar in tars:
            lengths = load_lengths(tar, key).lengths
            joined[start : start + len(lengths)] = lengths
            start += len(lengths)
        joined.flush()
        del joined
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_lengths_facts(tar: Shard, key: str, shard: ShardFacts) -> LengthsFacts:
    """Read the header of a shard's lengths.

    Args:
        tar: The shard.
        key: Settings of the lengths.
        shard: What its index says.

    Raises:
        DataError: They are missing, damaged, or belong to another version of the shard.
    """
    path = lengths_path(tar, key)
    try:
        facts, digest = read_facts(path)
        if facts["shard"] == shard.digest and facts["key"] == key:
            return LengthsFacts(tuple(facts["task_names"]), digest, int(facts["num_tokens"]), int(facts["num_problems"]))
        reason = "belongs to another version of the shard"
    except FileNotFoundError:
        reason = "is missing"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"is damaged ({error})"
    raise DataError(f"shard {tar}: {path.name} {reason}; {_FIX}")


def load_lengths(tar: Shard, key: str) -> SampleLengths:
    """Map the planned lengths of a shard.

    Raises:
        DataError: They are missing or damaged.
    """
    file = load_arrays(lengths_path(tar, key), subject=f"shard {tar}", fix=_FIX)
    try:
        problems = {int(number): reason for number, reason in file.facts["problems"].items()}
        return SampleLengths(file.arrays["lengths"], file.arrays["tasks"], tuple(file.facts["task_names"]), problems, file.digest)
    except KeyError as error:
        raise DataError(f"shard {tar}: {lengths_path(tar, key).name} has no {error}: it is another file; delete it and {_FIX}") from None


_FIX = "run `megamm data plan-lengths` with this recipe"
