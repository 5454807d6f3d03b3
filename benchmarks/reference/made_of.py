"""What runs, evaluations and shards of a work folder were made of, so that no figure of another recipe, model or data is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamm.checkpoint.manifest import MANIFEST, committed
from megamm.config import Recipe, load_recipe, load_resolved, to_dict
from megamm.core.errors import ConfigError
from megamm.core.files import canonical_json, digest_file, digest_text, read_json, write_json
from megamm.data.shards.index import read_shard_facts
from megamm.data.shards.places import rooted
from megamm.evaluation.held_out import held_out_patterns, list_places
from megamm.train.run_folder import RunFolder, differences

# What a recipe says of a run without changing what is learnt.
# Where shards and a tokenizer lie says nothing of what they hold: shards are compared by their contents, a tokenizer is in the run.
_BESIDE = ("description", "checkpoint.", "data.root", "evaluation.", "preflight.", "telemetry.", "tokenizer.folder")


def check_run(run: Path, recipe: str, overrides: Sequence[str], source: Path | None = None) -> None:
    """Refuse a run that learns, or has learnt, something else than is asked for; one without a checkpoint begins anew anyway.

    Args:
        run: Its folder, which need not exist.
        recipe: A name or a TOML file.
        overrides: Of the recipe.
        source: The run that it starts from, if any.

    Raises:
        ConfigError: Its recipe or its shards differ, or its source has other weights by now.
        DataError: A shard is missing or damaged.
    """
    folder, asked, shards = RunFolder(run), load_recipe(recipe, overrides), run.with_name("trained_on.json")
    digest = digest_of(_training_shards(asked))
    if not folder.has_checkpoints():
        write_json(shards, {"digest": digest})
        return
    # A command that goes on with a run takes the recipe from its archive: what was edited since would go unnoticed.
    found = differences(to_dict(load_resolved(folder.config)), to_dict(asked))
    fix = f"remove {run.parent} to train anew"
    if changed := [key for key in found if not key.startswith(_BESIDE)]:
        raise ConfigError(f"{run} learns another recipe than {recipe}: {', '.join(changed[:4])}{' …' * (len(changed) > 4)} differ; {fix}")
    if not shards.is_file() or read_json(shards)["digest"] != digest:
        raise ConfigError(f"{run} learns from other shards than {asked.data.root} has now; {fix}")
    if source is not None and read_json(folder.origin)["digest"] != digest_file(newest_manifest(source)):
        raise ConfigError(f"{run} started from other weights than {source} has now; {fix}")


def learned_digest(recipe: Recipe) -> str:
    """Digest of all that a recipe's tokenizer is learned from and by.

    Raises:
        DataError: A shard is missing or damaged.
    """
    settings = {key: value for key, value in to_dict(recipe)["tokenizer"].items() if key != "folder"}
    return digest_of([settings, _training_shards(recipe)])


def newest_manifest(run: Path) -> Path:
    """The manifest of a run's newest checkpoint, which names the digests of all of its files.

    Raises:
        ConfigError: There is no checkpoint.
    """
    found = committed(run / "checkpoints")
    if not found:
        raise ConfigError(f"{run} has no checkpoint; train it first")
    return found[-1][1] / MANIFEST


def figures_digest(run: Path, words: Sequence[str] = ()) -> str:
    """Digest of all that a trained run's figures depend on.

    Args:
        run: The run.
        words: Options of the evaluation.

    Raises:
        ConfigError: It has no checkpoint, or names no held-out shards.
        DataError: A held-out shard is missing or damaged.
    """
    shards = _shards(held_out_patterns(load_resolved(run / "config.json")))
    return digest_of([digest_file(newest_manifest(run)), shards, list(words)])


def _training_shards(recipe: Recipe) -> dict[str, dict[str, str]]:
    return _shards({name: rooted(one.shards, Path(recipe.data.root)) for name, one in recipe.data.train.items()})


def _shards(patterns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Dataset -> name of a shard -> digest of its table of contents, which names the digests of all members."""
    found: dict[str, dict[str, str]] = {}
    for place in list_places(patterns):
        of_dataset = found.setdefault(place.dataset, {})
        if place.tar.name not in of_dataset:
            of_dataset[place.tar.name] = read_shard_facts(place.tar).digest
    return found


def digest_of(value: Any) -> str:
    """Digest of plain JSON values."""
    return digest_text(canonical_json(value))
