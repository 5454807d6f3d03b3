"""The training samples of a recipe, one after the other, without their media."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from megamm.config import Data
from megamm.core.logging import get_logger
from megamm.core.types import Sample
from megamm.data.ledger import BadSample
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.mapping import SampleForm, read_sample
from megamm.data.shards.index import load_index
from megamm.data.shards.places import Shard
from megamm.data.shards.reader import ShardReader
from megamm.data.shards.remote import open_reader

_log = get_logger("prepare")


def training_samples(data: Data, shares: Mapping[str, float] | None = None) -> Iterator[tuple[Shard, Sample]]:
    """Every training sample and its shard, in the order of the shards; one that cannot be read is left out with a warning.

    Args:
        data: The training datasets, never the held-out ones, and what their members mean.
        shares: Dataset -> share of its samples that is read, in (0, 1], spread evenly over it; all where it is not named.

    Raises:
        ConfigError: A mapping contradicts itself.
        DataError: A dataset matches nothing, or a shard is gone, has no index or changed; names it.
    """
    with closing(open_reader(data.reading)) as reader:
        for name, dataset in data.train.items():
            form = SampleForm.of(name, dataset, data)
            share, num_seen = (shares or {}).get(name, 1.0), 0
            for tar in find_shards(name, dataset, Path(data.root), reading=data.reading):
                shard = ShardReader(tar, load_index(tar), reader)
                numbers = [number for number in range(shard.index.num_samples) if _is_read(num_seen + number, share)]
                num_seen += shard.index.num_samples
                for sample in _shard_samples(tar, shard, form, numbers):
                    yield tar, sample


def num_text_bytes(data: Data) -> dict[str, int]:
    """Training dataset -> bytes of its chats and texts, from indexes alone.

    Raises:
        DataError: As `training_samples`.
    """
    found = {}
    for name, dataset in data.train.items():
        indexes = [load_index(tar) for tar in find_shards(name, dataset, Path(data.root), reading=data.reading)]
        found[name] = sum(int(index.member_sizes[index.media_types == 0].sum()) for index in indexes)
    return found


def _is_read(number: int, share: float) -> bool:
    return int((number + 1) * share) > int(number * share)


def _shard_samples(tar: Shard, shard: ShardReader, form: SampleForm, numbers: Sequence[int]) -> Iterator[Sample]:
    for number in numbers:
        try:
            yield read_sample(shard, number, form, media=False)
        except BadSample as error:
            _log.warning("sample %s of shard %s cannot be read: %s", shard.index.key(number), tar, error)
