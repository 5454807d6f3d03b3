"""The shards of a dataset as one numbered list of samples."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamm.config import Data, Dataset
from megamm.core.errors import DataError
from megamm.core.files import canonical_json, digest_text
from megamm.data.features import MediaRules
from megamm.data.index import ShardFacts, check_unchanged, read_shard_facts
from megamm.data.lengths import ONE_SPEED, LengthsFacts, joined_lengths, lengths_key, load_lengths, read_lengths_facts
from megamm.data.mapping import OWN_FORM, SampleForm
from megamm.tokenizers.text import TextTokenizer

_NUM_OPENERS = 8


@dataclass(frozen=True)
class ShardSet:
    """One dataset.

    Attributes:
        name: Its name in the recipe.
        tars: Its shards, sorted by path.
        starts: int64[S + 1], number of the first sample of each shard.
        digest: Of all shards and their planned lengths, in order.
        task_names: Sorted names of the tasks that occur.
        key: Settings of the planned lengths.
        lengths: int32[N, V, 3], tokens, patches and frames of every variant of every sample; a mapped file for large datasets.
        shards_digest: Of all shards alone, in order: which samples there are and where.
        form: What the members of its samples mean.
    """

    name: str
    tars: tuple[Path, ...]
    starts: np.ndarray
    digest: str
    task_names: tuple[str, ...]
    key: str
    lengths: np.ndarray
    shards_digest: str
    form: SampleForm = OWN_FORM

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[Path, int]:
        """Shard of a sample, and its number there."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.tars[shard], index - int(self.starts[shard])

    @property
    def num_variants(self) -> int:
        """Lengths of each sample, of which the planner draws one."""
        return self.lengths.shape[1]

    def problem(self, index: int) -> str:
        """Why a sample that takes no tokens can never be used."""
        tar, number = self.locate(index)
        return load_lengths(tar, self.key).problems[number]


def find_shards(name: str, dataset: Dataset, root: Path) -> tuple[Path, ...]:
    """Shards that a dataset's path or glob names, sorted.

    Raises:
        DataError: There are none, or one is gone whose index is still there.
    """
    pattern = Path(dataset.shards)
    base, relative = (Path(pattern.anchor), pattern.relative_to(pattern.anchor)) if pattern.is_absolute() else (root, pattern)
    tars = tuple(sorted(path for path in base.glob(str(relative)) if path.is_file()))
    if not tars:
        raise DataError(f"dataset {name}: no shard matches {base / relative}; check data.root and its `shards`, or run `megamm prepare`")
    # A glob alone would not notice a shard that went missing.
    indexed = {path.with_name(path.name.removesuffix(".index")) for path in base.glob(f"{relative}.index")}
    if gone := sorted(indexed - set(tars)):
        raise DataError(f"dataset {name}: shard {gone[0]} does not exist, but its index does; bring it back or delete {gone[0].name}.index")
    return tars


def open_dataset(
    name: str, dataset: Dataset, data: Data, *, tokenizer: TextTokenizer, rules: MediaRules, speeds: Sequence[float] = ONE_SPEED
) -> ShardSet:
    """Open a dataset from the headers of its sidecars.

    Args:
        name: Its name in the recipe.
        dataset: Its shards and what their members mean.
        data: Folder that they are relative to, and limits.
        tokenizer: Of the run.
        rules: How media become tower inputs.
        speeds: At which its sounds are played.

    Raises:
        ConfigError: Its mapping contradicts itself.
        DataError: A shard, an index or lengths are missing, damaged or changed; or there is no sample.
    """
    form = SampleForm.of(name, dataset, data)
    key = lengths_key(tokenizer, rules, form=form, speeds=speeds)
    tars = find_shards(name, dataset, Path(data.root))
    # Headers are tiny; on a shared file system waiting for them is all that this takes.
    with ThreadPoolExecutor(_NUM_OPENERS) as pool:
        facts = list(pool.map(lambda tar: _facts_of(tar, key), tars))
    shards, lengths = [shard for shard, _ in facts], [one for _, one in facts]
    starts = np.cumsum([0, *(one.num_samples for one in shards)], dtype=np.int64)
    if not starts[-1]:
        raise DataError(f"dataset {name}: its {len(tars)} shards hold no sample; leave the dataset out")
    return ShardSet(
        name=name,
        tars=tars,
        starts=starts,
        digest=digest_text(canonical_json([[shard.digest, one.digest] for shard, one in zip(shards, lengths, strict=True)])),
        task_names=tuple(sorted({task for one in lengths for task in one.task_names})),
        key=key,
        lengths=joined_lengths(tars, key, [one.digest for one in lengths], starts, num_variants=len(speeds)),
        shards_digest=digest_text(canonical_json([shard.digest for shard in shards])),
        form=form,
    )


def _facts_of(tar: Path, key: str) -> tuple[ShardFacts, LengthsFacts]:
    shard = read_shard_facts(tar)
    check_unchanged(tar, shard)
    return shard, read_lengths_facts(tar, key, shard)
