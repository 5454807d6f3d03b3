"""The training samples of a recipe, one after the other, without their media."""

from __future__ import annotations

from collections.abc import Iterator
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
from megamm.data.shards.reader import Reader, ShardReader
from megamm.data.shards.remote import open_reader

_log = get_logger("prepare")


def training_samples(data: Data) -> Iterator[tuple[Shard, Sample]]:
    """Every training sample and its shard, in the order of the shards; one that cannot be read is left out with a warning.

    Args:
        data: The training datasets, never the held-out ones, and what their members mean.

    Raises:
        ConfigError: A mapping contradicts itself.
        DataError: A dataset matches nothing, or a shard is gone, has no index or changed; names it.
    """
    with closing(open_reader(data.reading)) as reader:
        for name, dataset in data.train.items():
            form = SampleForm.of(name, dataset, data)
            for tar in find_shards(name, dataset, Path(data.root), reading=data.reading):
                for sample in _shard_samples(tar, form, reader):
                    yield tar, sample


def _shard_samples(tar: Shard, form: SampleForm, reader: Reader) -> Iterator[Sample]:
    shard = ShardReader(tar, load_index(tar), reader)
    for number in range(shard.index.num_samples):
        try:
            yield read_sample(shard, number, form, media=False)
        except BadSample as error:
            _log.warning("sample %s of shard %s cannot be read: %s", shard.index.key(number), tar, error)
