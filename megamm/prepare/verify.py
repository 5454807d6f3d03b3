"""Indexing and verifying many shards: in parallel, all of them however many are refused, everything that is wrong in one report."""

from __future__ import annotations

import glob
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megamm.config import Reading
from megamm.core.errors import DataError
from megamm.core.tables import aligned
from megamm.data.samples.lengths import load_lengths, read_lengths_facts
from megamm.data.shards.index import ShardIndex, load_index, problem_kinds, read_shard_facts
from megamm.data.shards.places import RemoteShard, Shard, sidecar_path
from megamm.data.shards.sidecars import index_shards, named_shards, verify_shards

_LENGTHS_ENDING = ".lengths-"


@dataclass(frozen=True, slots=True)
class Checked:
    """One shard, indexed or verified.

    Attributes:
        shard: Its path or address.
        num_samples: Samples; 0 where it is refused.
        digest: Of the shard; empty where it is refused.
        refused: Why it, or a sidecar of it, cannot be used; empty where all is well.
        problems: Kind of reason -> samples that cannot be used.
        num_lengths: Sidecars of planned lengths that were looked at.
    """

    shard: str
    num_samples: int
    digest: str
    refused: str
    problems: dict[str, int]
    num_lengths: int = 0


def find_all(patterns: Sequence[str], sidecars: Path) -> list[Shard]:
    """The shards that paths, URLs, ranges and globs name, each once.

    Raises:
        ConfigError: A pattern cannot be read.
    """
    return list(dict.fromkeys(named_shards(patterns, sidecars, Reading())))


def check_all(shards: Sequence[Shard], sidecars: Path, *, write: bool, num_workers: int) -> Iterator[Checked]:
    """Index or verify shards, in their order as far as they are done.

    Args:
        shards: Local and remote.
        sidecars: Folder for the sidecars of remote shards.
        write: Read each shard and write its index; otherwise compare it with the index that it has.
        num_workers: Processes; 1 does everything in this one.

    Raises:
        DataError: A process ended by itself; what is wrong with a shard is in what is returned.
    """
    check = partial(_index if write else _verify, sidecars=sidecars)
    if num_workers == 1 or len(shards) == 1:
        yield from map(check, shards)
        return
    with _processes(min(num_workers, len(shards))) as pool:
        try:
            yield from pool.map(check, shards)
        except BrokenProcessPool:
            raise DataError("a process that read shards ended by itself; often memory ran out: use fewer --workers") from None


def stray_files(shards: Sequence[Shard]) -> list[Path]:
    """Temporary files that killed processes left beside shards (or that running ones are writing)."""
    folders = {sidecar_path(shard, "").parent for shard in shards}
    return sorted(path for folder in folders for path in folder.glob(".*.tmp"))


def summary(results: Sequence[Checked], stray: Sequence[Path]) -> list[str]:
    """What is wrong, for people; nothing where all is well."""
    lines: list[str] = []
    problems = Counter[str]()
    for one in results:
        problems.update(one.problems)
    if problems:
        lines += ["", *aligned(("samples that cannot be used, because", "samples"), problems.most_common())]
    refused = [(one.shard, one.refused) for one in results if one.refused]
    # A single one is the command's error.
    if len(refused) > 1:
        lines += ["", *aligned(("refused", "because"), refused)]
    if stray:
        lines += ["", *aligned(("temporary file; delete it unless something is writing", "bytes"), [(path, _size(path)) for path in stray])]
    return lines


def check_none_refused(results: Sequence[Checked]) -> None:
    """End with an error where shards were refused.

    Raises:
        DataError: The one refused shard's reason, or how many there are.
    """
    refused = [one for one in results if one.refused]
    if len(refused) == 1:
        raise DataError(refused[0].refused)
    if refused:
        raise DataError(f"{len(refused)} of {len(results)} shards are refused; each is named above")


def _index(shard: Shard, *, sidecars: Path) -> Checked:
    return _checked(shard, lambda: next(index_shards([_pattern(shard)], sidecars, Reading()))[1])


def _verify(shard: Shard, *, sidecars: Path) -> Checked:
    checked = _checked(shard, lambda: next(verify_shards([_pattern(shard)], sidecars, Reading()))[1])
    if checked.refused:
        return checked
    problems, keys = Counter(checked.problems), _lengths_keys(shard)
    for key in keys:
        try:
            read_lengths_facts(shard, key, read_shard_facts(shard))
            planned = load_lengths(shard, key).problems
        except DataError as error:
            return Checked(checked.shard, checked.num_samples, checked.digest, str(error), dict(problems), len(keys))
        # Planning repeats what the index noted, so the larger number counts each sample once.
        problems |= problem_kinds(shard, load_index(shard), planned)
    return Checked(checked.shard, checked.num_samples, checked.digest, "", dict(problems), len(keys))


def _checked(shard: Shard, read: Callable[[], ShardIndex]) -> Checked:
    try:
        index = read()
    except DataError as error:
        return Checked(str(shard), 0, "", str(error), {})
    except OSError as error:
        where = f" ({error.filename})" if error.filename and error.filename != str(shard) else ""
        reason = f"shard {shard}: {error.strerror or error}{where}; put that right and run the same command again"
        return Checked(str(shard), 0, "", reason, {})
    return Checked(str(shard), index.num_samples, index.digest, "", dict(problem_kinds(shard, index, index.problems)))


def _pattern(shard: Shard) -> str:
    return shard.url if isinstance(shard, RemoteShard) else str(shard)


def _lengths_keys(shard: Shard) -> list[str]:
    path = sidecar_path(shard, _LENGTHS_ENDING)
    return sorted(one.name.removeprefix(path.name) for one in path.parent.glob(f"{glob.escape(path.name)}*"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _processes(num: int) -> Iterator[Executor]:
    """Workers that leave ctrl-c to their parent, which takes back what they have not begun."""
    pool = ProcessPoolExecutor(num, multiprocessing.get_context("forkserver"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
