"""Planned lengths: what every sample of a shard will take of a row, so that planning opens no tar and no tokenizer.

A second sidecar beside the index, one for each pair of shard and settings (tokenizer, template, media rules). A sample that
can never be used has length 0 and a reason, so that it is planned as skipped instead of failing when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamm.core.errors import DataError
from megamm.core.files import canonical_json, digest_text
from megamm.data.arrays import load_arrays, read_facts, write_arrays
from megamm.data.encode import SampleEncoder, parse_document
from megamm.data.features import MediaRules
from megamm.data.index import ShardFacts, load_index, read_shard_facts
from megamm.data.ledger import BadSample
from megamm.data.reader import LocalReader, ShardReader
from megamm.tokenizers.text import TextTokenizer

LENGTHS_VERSION = 1
_MAX_REASON = 300


@dataclass(frozen=True)
class SampleLengths:
    """Planned lengths of one shard. Legend: N samples.

    Attributes:
        lengths: int32[N, 3], tokens, patches and frames; zeros for a sample that cannot be used.
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
        """int32[N]."""
        return self.lengths[:, 0]

    @property
    def patches(self) -> np.ndarray:
        """int32[N]."""
        return self.lengths[:, 1]

    @property
    def frames(self) -> np.ndarray:
        """int32[N]."""
        return self.lengths[:, 2]


@dataclass(frozen=True, slots=True)
class LengthsFacts:
    """What opening a dataset needs of each shard's lengths, read from the header alone."""

    task_names: tuple[str, ...]
    digest: str


def lengths_key(tokenizer: TextTokenizer, rules: MediaRules) -> str:
    """Digest of everything besides the shard that a planned length depends on."""
    return digest_text(canonical_json([LENGTHS_VERSION, tokenizer.fingerprint, rules.fingerprint]))[:16]


def lengths_path(tar: Path, key: str) -> Path:
    """Where the lengths of a shard under some settings lie."""
    return tar.with_name(f"{tar.name}.lengths-{key}")


def plan_lengths(tar: Path, tokenizer: TextTokenizer, rules: MediaRules) -> SampleLengths:
    """Measure every sample of a shard from its JSON and its media's headers.

    Raises:
        DataError: The shard or its index is missing, damaged or changed.
    """
    index, reader = load_index(tar), LocalReader()
    shard, encoder = ShardReader(tar, index, reader), SampleEncoder(tokenizer, rules)
    lengths = np.zeros((index.num_samples, 3), dtype=np.int32)
    tasks = np.zeros(index.num_samples, dtype=np.uint16)
    task_numbers: dict[str, int] = {}
    problems: dict[int, str] = {}
    for number in range(index.num_samples):
        try:
            if number in index.problems:
                raise BadSample(index.problems[number])
            sample = parse_document(index.key(number), shard.document(number), shard=tar.name)
            size = encoder.measure(sample, index.media(number))
        except BadSample as error:
            problems[number] = str(error)[:_MAX_REASON]
            continue
        lengths[number] = size.tokens, size.patches, size.frames
        tasks[number] = task_numbers.setdefault(sample.task, len(task_numbers))
    reader.close()
    return SampleLengths(lengths, tasks, tuple(task_numbers), problems)


def write_lengths(tar: Path, tokenizer: TextTokenizer, rules: MediaRules) -> SampleLengths:
    """`plan_lengths`, written beside the shard.

    Raises:
        DataError: As `plan_lengths`.
    """
    planned, key = plan_lengths(tar, tokenizer, rules), lengths_key(tokenizer, rules)
    facts = {
        "version": LENGTHS_VERSION,
        "key": key,
        "shard": read_shard_facts(tar).digest,
        "task_names": list(planned.task_names),
        "problems": {str(number): reason for number, reason in planned.problems.items()},
    }
    digest = write_arrays(lengths_path(tar, key), {"lengths": planned.lengths, "tasks": planned.tasks}, facts)
    return SampleLengths(planned.lengths, planned.tasks, planned.task_names, planned.problems, digest)


def ensure_lengths(tars: Iterable[Path], tokenizer: TextTokenizer, rules: MediaRules) -> list[Path]:
    """Write the lengths of those shards that lack them or changed since; one process a file system should call this.

    Returns:
        The shards whose lengths were written.

    Raises:
        DataError: As `plan_lengths`.
    """
    key = lengths_key(tokenizer, rules)
    written = []
    for tar in tars:
        try:
            read_lengths_facts(tar, key, read_shard_facts(tar))
        except DataError:
            write_lengths(tar, tokenizer, rules)
            written.append(tar)
    return written


def read_lengths_facts(tar: Path, key: str, shard: ShardFacts) -> LengthsFacts:
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
            return LengthsFacts(tuple(facts["task_names"]), digest)
        reason = "belongs to another version of the shard"
    except FileNotFoundError:
        reason = "is missing"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"is damaged ({error})"
    raise DataError(f"shard {tar}: {path.name} {reason}; {_FIX}")


def load_lengths(tar: Path, key: str) -> SampleLengths:
    """Map the planned lengths of a shard.

    Raises:
        DataError: They are missing or damaged.
    """
    file = load_arrays(lengths_path(tar, key), subject=f"shard {tar}", fix=_FIX)
    problems = {int(number): reason for number, reason in file.facts["problems"].items()}
    return SampleLengths(file.arrays["lengths"], file.arrays["tasks"], tuple(file.facts["task_names"]), problems, file.digest)


_FIX = "run `megamm data plan-lengths` with this recipe"
