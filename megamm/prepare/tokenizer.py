"""The tokenizer of a recipe, made from the texts that its shards hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megamm.config import Data, Recipe
from megamm.core.types import Part
from megamm.prepare.items import make_items
from megamm.prepare.samples import num_text_bytes, training_samples
from megamm.tokenizers import text


def texts(data: Data) -> Iterator[str]:
    """Texts of training samples: prompts, answers, labels of boxes and documents, in the order of the shards.

    A dataset with more text than the mean one gives as much as that, from samples spread evenly over it: a shop whose every history repeats
    what its items are called would else decide most pieces. A sample that cannot be read is left out with a warning.

    Args:
        data: The training datasets, never the held-out ones, and what their members mean.

    Raises:
        ConfigError: A mapping contradicts itself.
        DataError: A dataset matches nothing, or a shard is gone, has no index or changed; names it.
    """
    sizes = num_text_bytes(data)
    shares = {name: min(1.0, sum(sizes.values()) / len(sizes) / size) for name, size in sizes.items() if size}
    for _, sample in training_samples(data, shares):
        for message in sample.messages:
            for part in message.content:
                yield from _part_texts(part)


def make_tokenizer(recipe: Recipe) -> str:
    """Write the recipe's tokenizer folder: adopted, or trained on its training shards (never on held-out ones), with codes for its items.

    Returns:
        What was written, in one line.

    Raises:
        ConfigError: As `text.train`, `text.adopt` and `make_items`.
        DataError: As `texts` and `make_items`.
    """
    config = recipe.tokenizer
    folder = Path(config.folder)
    items = make_items(recipe)
    if config.adopt:
        tokenizer = text.adopt(config, folder, items=items)
    else:
        tokenizer = text.train(texts(recipe.data), config, folder, items=items)
    blocks = ", ".join(f"{block.name} {block.size}" for block in tokenizer.vocabulary.blocks if block.size)
    listed = "" if items is None else f"{len(items)} items, "
    return f"{folder}: {tokenizer.vocabulary.size} ids ({blocks}), {listed}fingerprint {tokenizer.fingerprint}"


def _part_texts(part: Part) -> Iterator[str]:
    if part.text:
        yield part.text
    yield from (box["label"] for box in part.data.get("boxes", ()))
    yield from part.data.get("labels", ())
