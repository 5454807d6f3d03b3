"""The tokenizer of a recipe, made from the texts that its shards hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from megamm.config.schema import Dataset, Recipe
from megamm.core.errors import DataError
from megamm.core.types import Part
from megamm.data.datasets import find_shards
from megamm.data.index import load_index
from megamm.tasks.template import parse_sample
from megamm.tokenizers import text


def texts(patterns: Iterable[str]) -> Iterator[str]:
    """All texts of all samples: prompts, answers, labels of boxes and documents, in the order of the shards.

    Args:
        patterns: Paths or globs of tar files.

    Raises:
        DataError: A pattern matches nothing, a shard is gone, has no index or changed, or a sample is not a chat; names it.
    """
    for pattern in patterns:
        for tar in find_shards(pattern, Dataset(pattern), Path()):
            yield from _shard_texts(tar)


def make_tokenizer(recipe: Recipe) -> str:
    """Write the recipe's tokenizer folder: adopted, or trained on its training shards (never on held-out ones).

    Returns:
        What was written, in one line.

    Raises:
        ConfigError: As `text.train` and `text.adopt`.
        DataError: As `texts`.
    """
    config = recipe.tokenizer
    folder = Path(config.folder)
    if config.adopt:
        tokenizer = text.adopt(config, folder)
    else:
        patterns = [os.path.join(recipe.data.root, dataset.shards) for dataset in recipe.data.train.values()]  # noqa: PTH118, a glob
        tokenizer = text.train(texts(patterns), config, folder)
    blocks = ", ".join(f"{block.name} {block.size}" for block in tokenizer.vocabulary.blocks if block.size)
    return f"{folder}: {tokenizer.vocabulary.size} ids ({blocks}), fingerprint {tokenizer.fingerprint}"


def _shard_texts(tar: Path) -> Iterator[str]:
    index = load_index(tar)
    with tar.open("rb") as file:
        for sample in range(index.num_samples):
            if sample in index.problems:
                continue
            member = next(member for member in index.members(sample) if member.suffix == "json")
            content = os.pread(file.fileno(), member.size, member.offset)
            key = index.key(sample)
            where = f"shard {tar} sample {key!r}"
            if xxhash.xxh3_64_intdigest(content) != member.digest:
                raise DataError(f"{where}: the bytes of {key}.json changed since they were indexed; restore the shard or write it anew")
            for message in parse_sample(key, json.loads(content), where=where).messages:
                for part in message.content:
                    yield from _part_texts(part)


def _part_texts(part: Part) -> Iterator[str]:
    if part.text:
        yield part.text
    yield from (box["label"] for box in part.data.get("boxes", ()))
    yield from part.data.get("labels", ())
