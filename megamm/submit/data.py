"""Whether the data of a recipe are there, and what the job would have to make of them first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamm.config import Dataset, Recipe
from megamm.core.errors import ConfigError
from megamm.data.media.features import MediaRules
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.lengths import ONE_SPEED, lengths_key, lengths_path
from megamm.data.samples.mapping import SampleForm
from megamm.data.shards.places import Shard, is_url, sidecar_path
from megamm.status.units import several
from megamm.submit.finding import Finding, good, note, problem
from megamm.submit.job import Plan
from megamm.tokenizers.text import TextTokenizer


def check_data(plan: Plan) -> Iterator[Finding]:
    """The tokenizer, the shards of every dataset, their indexes and planned lengths; nothing is written or fetched."""
    recipe, run = plan.trained
    tokenizer = None
    try:
        archived = run / "tokenizer"
        tokenizer = TextTokenizer.load(archived if archived.is_dir() else Path(recipe.tokenizer.folder))
    except ConfigError as error:
        yield problem(str(error))
    yield from _check_datasets(recipe, tokenizer)


def check_shards(plan: Plan) -> Iterator[Finding]:
    """The shards of every dataset and their indexes, before there is a tokenizer."""
    assert plan.recipe is not None, "a recipe names the shards"
    yield from _check_datasets(plan.recipe, None)


def _check_datasets(recipe: Recipe, tokenizer: TextTokenizer | None) -> Iterator[Finding]:
    if not recipe.data.train:
        yield problem("data.train names no dataset")
    held_out = recipe.data.held_out if recipe.evaluation.every or recipe.evaluation.tasks_every else {}
    num_unplanned = 0
    for name, dataset, is_trained in [*((*one, True) for one in recipe.data.train.items()), *((*one, False) for one in held_out.items())]:
        if is_url(dataset.shards):
            yield note(f"{name}: {dataset.shards.partition('?')[0]} is not looked at from here")
            continue
        found = _look(recipe, name, dataset, tokenizer, is_trained=is_trained)
        title = f"{name}{'' if is_trained else ' (held out)'}"
        if found.unindexed:
            more = f" and {len(found.unindexed) - 1:,} more" if len(found.unindexed) > 1 else ""
            yield problem(f"{title}: {found.unindexed[0]}{more} has no index; run `megamm data index` on it")
        else:
            yield good(f"{title}: {several(found.num_shards, 'shard')}")
        num_unplanned += found.num_unplanned
    if num_unplanned:
        shards = f"{num_unplanned:,} shards have" if num_unplanned > 1 else "1 shard has"
        yield note(f"{shards} no planned lengths: the job makes them while its GPUs wait; `megamm data plan-lengths` makes them before")


@dataclass(frozen=True, slots=True)
class _Found:
    num_shards: int
    unindexed: list[Shard]
    num_unplanned: int


def _look(recipe: Recipe, name: str, dataset: Dataset, tokenizer: TextTokenizer | None, *, is_trained: bool) -> _Found:
    """Which sidecars a dataset of local shards has; lengths belong to a tokenizer, and without one nothing is said of them."""
    data = recipe.data
    form = SampleForm.of(name, dataset, data)
    tars, present = find_shards(name, dataset, Path(data.root), reading=data.reading), _Listing()
    unindexed = [tar for tar in tars if not present(sidecar_path(tar, ".index"))]
    num_unplanned = 0
    if tokenizer is not None and not unindexed:
        speeds = dataset.augment.audio_speeds if is_trained else ONE_SPEED
        key = lengths_key(tokenizer, MediaRules.of(recipe.model, data), form=form, speeds=speeds)
        num_unplanned = sum(not present(lengths_path(tar, key)) for tar in tars)
    return _Found(len(tars), unindexed, num_unplanned)


class _Listing:
    """Which files there are, by one listing a folder. State: the listings."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def __call__(self, path: Path) -> bool:
        if path.parent not in self._names:
            self._names[path.parent] = frozenset(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else frozenset()
        return path.name in self._names[path.parent]
