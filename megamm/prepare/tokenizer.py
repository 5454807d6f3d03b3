"""The tokenizer of a recipe, made from the texts that its shards hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from megamm.config import Data, Recipe
from megamm.core.logging import get_logger
from megamm.core.types import Part
from megamm.data.ledger import BadSample
from megamm.data.samples.datasets import find_shards
from megamm.data.samples.mapping import SampleForm, read_sample
from megamm.data.shards.index import load_index
from megamm.data.shards.places import Shard
from megamm.data.shards.reader import Reader, ShardReader
from megamm.data.shards.remote import open_reader
from megamm.tokenizers import text

_log = get_logger("prepare")


def texts(data: Data) -> Iterator[str]:
    """All texts of all training samples: prompts, answers, labels of boxes and documents, in the order of the shards.

    A sample that cannot be read is left out with a warning.

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
                yield from _shard_texts(tar, form, reader)


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
        tokenizer = text.train(texts(recipe.data), config, folder)
    blocks = ", ".join(f"{block.name} {block.size}" for block in tokenizer.vocabulary.blocks if block.size)
    return f"{folder}: {tokenizer.vocabulary.size} ids ({blocks}), fingerprint {tokenizer.fingerprint}"


def _shard_texts(tar: Shard, form: SampleForm, reader: Reader) -> Iterator[str]:
    shard = ShardReader(tar, load_index(tar), reader)
    for number in range(shard.index.num_samples):
        try:
            sample = read_sample(shard, number, form, media=False)
        except BadSample as error:
            _log.warning("sample %s of shard %s gives no text: %s", shard.index.key(number), tar, error)
            continue
        for message in sample.messages:
            for part in message.content:
                yield from _part_texts(part)


def _part_texts(part: Part) -> Iterator[str]:
    if part.text:
        yield part.text
    yield from (box["label"] for box in part.data.get("boxes", ()))
    yield from part.data.get("labels", ())
