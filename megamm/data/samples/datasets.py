"""The shards of a dataset as one numbered list of samples."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamm.config import Data, Dataset, Reading
from megamm.core.errors import DataError
from megamm.core.files import canonical_json, digest_text
from megamm.core.logging import get_logger
from megamm.data.media.features import MediaRules
from megamm.data.samples.catalogue import Catalogue
from megamm.data.samples.lengths import ONE_SPEED, joined_lengths, lengths_key, load_lengths, open_catalogue
from megamm.data.samples.mapping import OWN_FORM, SampleForm
from megamm.data.shards.places import Shard, expand, has_magic, is_sidecar, is_url, rooted
from megamm.data.shards.sidecars import find_remote_shards, sidecar_folder
from megamm.tokenizers.text import TextTokenizer

_log = get_logger("data")


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
    tars: tuple[Shard, ...]
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

    def locate(self, index: int) -> tuple[Shard, int]:
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
        problems = load_lengths(tar, self.key).problems
        if number not in problems:
            # The lengths that planning saw are not those of the shard: the joined file has no digest of its own.
            raise DataError(f"dataset {self.name}: sample {number} of {tar} has no planned length; delete lengths-*.npy beside it")
        return problems[number]


def find_shards(
    name: str, dataset: Dataset, root: Path, *, reading: Reading | None = None, on_index: Callable[[], None] | None = None
) -> tuple[Shard, ...]:
    """Shards that a dataset's path, URL, brace range or glob names, sorted; indexes of remote ones are fetched where they are missing.

    Args:
        name: Of the dataset.
        dataset: Its `shards`.
        root: Folder that paths are relative to.
        reading: Settings of reading.
        on_index: Called after each index that was fetched.

    Raises:
        ConfigError: What names the shards cannot be read from.
        DataError: There are none, or one that is named, or whose index is still there, does not exist.
    """
    if is_url(dataset.shards):
        reading = reading or Reading()
        tars: tuple[Shard, ...] = find_remote_shards(dataset.shards, sidecar_folder(root, reading), reading, on_index)
    else:
        tars = _find_local(name, dataset.shards, root)
    if not tars:
        raise DataError(
            f"dataset {name}: no shard matches {rooted(dataset.shards, root)}; check data.root and its `shards`, or run `megamm prepare`"
        )
    return tars


def _find_local(name: str, pattern: str, root: Path) -> tuple[Path, ...]:
    wanted: dict[Path, list[str]] = {}
    for one in expand(pattern):
        path = root / one
        for folder in _folders(path.parent):
            wanted.setdefault(folder, []).append(path.name)
    tars: list[Path] = []
    for folder in sorted(wanted):
        # One listing a folder, however many names are wanted: of a hundred thousand files looking for each takes seconds.
        files = {entry.name for entry in os.scandir(folder) if entry.is_file()} if folder.is_dir() else set()
        tars += [folder / one for one in _matching(name, folder, wanted[folder], files)]
    return tuple(tars)


def _folders(pattern: Path) -> list[Path]:
    if not has_magic(str(pattern)):
        return [pattern]
    base = Path(pattern.anchor)
    return [path for path in base.glob(str(pattern.relative_to(base))) if path.is_dir()]


def _matching(name: str, folder: Path, patterns: list[str], files: set[str]) -> list[str]:
    """Sorted names of the shards of a folder; one that is missing is told."""
    found: set[str] = set()
    for pattern in patterns:
        if has_magic(pattern):
            found.update(one for one in fnmatch.filter(files, pattern) if not is_sidecar(one))
            # A glob alone would not notice a shard that went missing.
            indexed = {one[: -len(".index")] for one in files if one.endswith(".index") and one[: -len(".index")] not in files}
            indexed = set(fnmatch.filter(indexed, pattern))
        else:
            found.update({pattern} & files)
            indexed = {pattern} if f"{pattern}.index" in files or len(patterns) > 1 else set()
        if gone := sorted(indexed - files):
            index = f", but its index does; bring it back or delete {gone[0]}.index" if f"{gone[0]}.index" in files else "; bring it back"
            raise DataError(f"dataset {name}: shard {folder / gone[0]} does not exist{index}")
    return sorted(found)


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
    tars = find_shards(name, dataset, Path(data.root), reading=data.reading)
    catalogue = open_catalogue(tars, key)
    starts = np.concatenate([[0], np.cumsum(catalogue.num_samples)])
    if not starts[-1]:
        raise DataError(f"dataset {name}: its {len(tars)} shards hold no sample; leave the dataset out")
    _tell_of_copies(name, tars, catalogue)
    return ShardSet(
        name=name,
        tars=tars,
        starts=starts,
        digest=digest_text(canonical_json(list(zip(catalogue.digests, catalogue.lengths_digests, strict=True)))),
        task_names=catalogue.task_names,
        key=key,
        lengths=joined_lengths(tars, key, catalogue.lengths_digests, starts, num_variants=len(speeds)),
        shards_digest=digest_text(canonical_json(catalogue.digests)),
        form=form,
    )


def _tell_of_copies(name: str, tars: Sequence[Shard], catalogue: Catalogue) -> None:
    """Warn of shards with the same content: a copy or a link that was left in the folder is drawn as often as the shard itself."""
    by_digest: dict[str, Shard] = {}
    copies = [
        (first, tar)
        for tar, digest, num_samples in zip(tars, catalogue.digests, catalogue.num_samples.tolist(), strict=True)
        if num_samples and (first := by_digest.setdefault(digest, tar)) is not tar
    ]
    if copies:
        more = f" (and {len(copies) - 1} more such shards)" if len(copies) > 1 else ""
        _log.warning(
            "dataset %s: shards %s and %s have the same content%s: every pass draws their samples twice; remove one unless that is wanted",
            name,
            *copies[0],
            more,
        )
