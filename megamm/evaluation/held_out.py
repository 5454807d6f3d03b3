"""Held-out samples in a fixed order, each once: what an evaluation reads and what it has to skip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamm.config import Data, Dataset, Reading, Recipe
from megamm.core.errors import ConfigError, DataError
from megamm.core.types import Sample
from megamm.data.ledger import BadSample
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.mapping import OWN_FORM, SampleForm, read_sample
from megamm.data.shards.index import read_shard_facts
from megamm.data.shards.places import Shard, rooted
from megamm.data.shards.reader import ShardPool
from megamm.data.shards.remote import open_reader
from megamm.evaluation.records import Identity, SkippedSample


@dataclass(frozen=True, slots=True)
class Place:
    """Where a held-out sample lies: dataset, shard and number inside the shard; and what is done to its media (`changes`)."""

    dataset: str
    tar: Shard
    number: int
    change: str = ""

    @property
    def identity(self) -> Identity:
        """What tells it from every other place."""
        return self.dataset, self.tar.name, self.number, self.change


def held_out_patterns(recipe: Recipe | None) -> dict[str, str]:
    """Dataset name -> path or glob of the held-out datasets that a recipe names.

    Raises:
        ConfigError: There are none.
    """
    if recipe is None:
        raise ConfigError("an exported folder names no held-out data; give them with --shards NAME=GLOB")
    if not recipe.data.held_out:
        raise ConfigError("the run's recipe has no data.held_out; give held-out shards with --shards NAME=GLOB")
    return {name: rooted(dataset.shards, Path(recipe.data.root)) for name, dataset in recipe.data.held_out.items()}


def sample_forms(recipe: Recipe | None, names: Sequence[str]) -> dict[str, SampleForm]:
    """Dataset name -> what its members mean, as the recipe says of the dataset of that name; our own form for other names.

    Raises:
        ConfigError: A mapping contradicts itself.
    """
    data = Data() if recipe is None else recipe.data
    known = {**data.train, **data.held_out}
    return {name: SampleForm.of(name, known.get(name, Dataset("")), data) for name in names}


def list_places(patterns: Mapping[str, str], max_samples: int | None = None, *, reading: Reading | None = None) -> list[Place]:
    """All samples of all datasets, by dataset, shard name and number.

    Args:
        patterns: Dataset name -> path or glob of tar files.
        max_samples: At most so many of each dataset, spread evenly over it, because neighbours in a shard are often alike.
        reading: Settings of reading.

    Raises:
        DataError: A pattern matches nothing, a shard is gone or has no usable index, or two of a dataset have the same file name.
    """
    places = []
    for dataset, pattern in patterns.items():
        tars = find_shards(dataset, Dataset(str(pattern)), Path(), reading=reading)
        _check_names(dataset, tars)
        own = [Place(dataset, tar, number) for tar in tars for number in range(read_shard_facts(tar).num_samples)]
        places += own if max_samples is None else _spread(own, max_samples)
    return places


def read_samples(
    places: Sequence[Place], forms: Mapping[str, SampleForm] | None = None, *, reading: Reading | None = None
) -> Iterator[tuple[Place, Sample | SkippedSample]]:
    """Each sample with its media, or why it is skipped.

    Args:
        places: Which samples.
        forms: Dataset name -> what its members mean; our own form where not named.
        reading: Settings of reading.

    Raises:
        DataError: A shard is missing, or changed since it was indexed.
    """
    pool = ShardPool(open_reader(reading or Reading()))
    try:
        for place in places:
            yield place, _read(pool, place, (forms or {}).get(place.dataset, OWN_FORM))
    finally:
        pool.close()


def skipped(place: Place, key: str, reason: object) -> SkippedSample:
    """The entry of a sample that cannot be evaluated."""
    return SkippedSample(dataset=place.dataset, shard=place.tar.name, number=place.number, change=place.change, key=key, reason=str(reason))


def _read(pool: ShardPool, place: Place, form: SampleForm) -> Sample | SkippedSample:
    shard = pool.shard(place.tar)
    try:
        return read_sample(shard, place.number, form)
    except BadSample as error:
        return skipped(place, shard.index.key(place.number), error)


def _check_names(dataset: str, tars: Iterable[Shard]) -> None:
    """What a model did with a sample is kept under the name of its shard."""
    named: dict[str, Shard] = {}
    for tar in tars:
        other = named.setdefault(tar.name, tar)
        if other is not tar:
            raise DataError(f"{other} and {tar} of {dataset} have one file name, by which answers are kept; give each folder by itself")


def _spread(places: list[Place], num_wanted: int) -> list[Place]:
    if num_wanted >= len(places):
        return places
    return [places[index * len(places) // num_wanted] for index in range(num_wanted)]
