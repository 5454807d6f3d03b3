"""Whether the data of a recipe are there, and what the job would have to make of them first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megamm.config import Dataset
from megamm.core.errors import ConfigError
from megamm.data.media.features import MediaRules
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.lengths import ONE_SPEED, lengths_key, lengths_path
from megamm.data.samples.mapping import SampleForm
from megamm.data.shards.places import Shard, is_url, sidecar_path
from megamm.submit.finding import Finding, good, note, problem
from megamm.submit.job import Plan
from megamm.tokenizers.text import TextTokenizer


def check_data(plan: Plan) -> Iterator[Finding]:
    """The tokenizer, the shards of every dataset, their indexes and planned lengths; nothing is written or fetched."""
    recipe = plan.recipe
    if not recipe.data.train:
        yield problem("data.train names no dataset")
    tokenizer = None
    try:
        archived = plan.run / "tokenizer"
        tokenizer = TextTokenizer.load(archived if archived.is_dir() else Path(recipe.tokenizer.folder))
    except ConfigError as error:
        yield problem(str(error))
    held_out = recipe.data.held_out if recipe.evaluation.every else {}
    for name, dataset, is_trained in [*((*one, True) for one in recipe.data.train.items()), *((*one, False) for one in held_out.items())]:
        yield from _check_dataset(plan, name, dataset, tokenizer, is_trained=is_trained)


def _check_dataset(plan: Plan, name: str, dataset: Dataset, tokenizer: TextTokenizer | None, *, is_trained: bool) -> Iterator[Finding]:
    data = plan.recipe.data
    title = name if is_trained else f"{name} (held out)"
    form = SampleForm.of(name, dataset, data)
    if is_url(dataset.shards):
        yield note(f"{title}: {dataset.shards.partition('?')[0]} is not looked at from here")
        return
    tars = find_shards(name, dataset, Path(data.root), reading=data.reading)
    present = _Listing()
    if unindexed := [tar for tar in tars if not present(sidecar_path(tar, ".index"))]:
        more = f" and {len(unindexed) - 1} more" if len(unindexed) > 1 else ""
        yield problem(f"{title}: {unindexed[0]}{more} has no index; run `megamm data index` on it")
        return
    yield good(f"{title}: shards: {len(tars):,}")
    if tokenizer is not None:
        speeds = dataset.augment.audio_speeds if is_trained else ONE_SPEED
        key = lengths_key(tokenizer, MediaRules.of(plan.recipe.model, data), form=form, speeds=speeds)
        yield from _check_lengths(title, tars, key, present)


def _check_lengths(title: str, tars: Sequence[Shard], key: str, present: _Listing) -> Iterator[Finding]:
    unplanned = [tar for tar in tars if not present(lengths_path(tar, key))]
    if unplanned:
        yield note(
            f"{title}: {len(unplanned):,} of {len(tars):,} shards have no planned lengths: the job makes them while its GPUs wait; "
            "`megamm data plan-lengths` makes them before"
        )


class _Listing:
    """Which files there are, by one listing a folder. State: the listings."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def __call__(self, path: Path) -> bool:
        if path.parent not in self._names:
            self._names[path.parent] = frozenset(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else frozenset()
        return path.name in self._names[path.parent]
