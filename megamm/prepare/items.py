"""The codes of a recipe's items, learned from the lists beside its training shards and from the samples in them.

Which items there are, and what describes them, is said by `items.jsonl` beside the shards of a dataset: a line `{"id", "text"}` an item,
those included that only held-out samples meet. What is met with what is read from training samples alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megamm.config import Data, Recipe
from megamm.core.errors import DataError
from megamm.core.files import canonical_json, digest_text
from megamm.core.types import Sample
from megamm.data.samples.datasets import find_shards
from megamm.data.shards.beside import read_beside
from megamm.prepare.samples import training_samples
from megamm.tokenizers.item_codes import learn_codes
from megamm.tokenizers.item_features import item_features
from megamm.tokenizers.items import ITEMS_FILE, ItemTable

_RULES = 1
"""Counts up when codes are learned in another way."""


def make_items(recipe: Recipe) -> ItemTable | None:
    """The table of all items of the training datasets; None where the vocabulary has no codes for items, or no dataset lists any.

    A table in the tokenizer's folder that was made from the same is taken as it is: another machine could round otherwise.

    Raises:
        ConfigError: There are more items than codes, or scikit-learn is not installed.
        DataError: A list is damaged, lists describe one item in two ways, a training sample holds an item that is in no list, or a
            dataset cannot be read.
    """
    config = recipe.tokenizer
    texts: dict[str, str] = {}
    listing = [name for name in recipe.data.train if config.item_levels * config.item_codes and _add_lists(name, recipe.data, texts)]
    if not texts:
        return None
    ids = tuple(sorted(texts))
    data = replace(recipe.data, train={name: recipe.data.train[name] for name in listing})
    meetings = list(_meetings(data, {item: row for row, item in enumerate(ids)}))
    made_from = _digest(texts, meetings, [_RULES, recipe.seed, config.item_levels, config.item_codes])
    path = Path(config.folder) / ITEMS_FILE
    if path.exists() and (known := ItemTable.load(path)).made_from == made_from:
        return known
    # Ids may be numbered by when an item was first met, or by its price: nothing may follow from their order.
    order = np.array(sorted(range(len(ids)), key=lambda row: digest_text(f"{recipe.seed}/{ids[row]}")))
    places = np.argsort(order)
    features = item_features([texts[ids[row]] for row in order], [np.sort(places[meeting]) for meeting in meetings], seed=recipe.seed)
    codes = learn_codes(features, config.item_levels, config.item_codes, seed=recipe.seed)[places]
    return ItemTable(ids, tuple(texts[item] for item in ids), codes, config.item_codes, made_from)


def _add_lists(name: str, data: Data, found: dict[str, str]) -> bool:
    """Add the lists beside a dataset's shards to `found`; whether there are any."""
    dataset = data.train[name]
    if dataset.mapping is not None:
        # Shards of another form have no items, whatever a file of that name says there.
        return False
    folders = {}
    for shard in find_shards(name, dataset, Path(data.root), reading=data.reading):
        folders.setdefault(str(shard).rpartition("/")[0], shard)
    contents = {folder: read_beside(shard, ITEMS_FILE, data.reading) for folder, shard in folders.items()}
    for folder, content in contents.items():
        for number, line in enumerate((content or b"").split(b"\n"), 1):
            if line:
                _add(line, f"{folder}/{ITEMS_FILE}, line {number}", found)
    return any(content is not None for content in contents.values())


def _add(line: bytes, where: str, found: dict[str, str]) -> None:
    item, text = _item(line, where)
    if found.get(item) and text and found[item] != text:
        raise DataError(
            f"{where}: item {item!r} is {text[:80]!r} here and {found[item][:80]!r} in a list before; give items of two shops ids that "
            "differ"
        )
    found[item] = text or found.get(item, "")


def _item(line: bytes, where: str) -> tuple[str, str]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f'{where} is not JSON ({error}); write {{"id": …, "text": …}} a line') from None
    if not isinstance(value, dict) or not isinstance(value.get("id"), str) or not value["id"] or not isinstance(value.get("text", ""), str):
        raise DataError(f'{where} is no item; write {{"id": …, "text": …}} a line, both strings')
    return value["id"], value.get("text", "")


def _meetings(data: Data, rows: dict[str, int]) -> Iterator[np.ndarray]:
    """Rows of the items that each training sample has in its answer and just before it.

    So a basket counts when it is asked for and when it is the last one shown, once each, however many later samples show it again.
    """
    for shard, sample in training_samples(data):
        items = {item for run in _last_runs(sample) for item in run}
        if unknown := sorted(items - rows.keys()):
            raise DataError(
                f"sample {sample.key} of shard {shard} holds item {unknown[0]!r}, which no {ITEMS_FILE} beside training shards lists; add "
                "it there"
            )
        if len(items) > 1:
            yield np.array(sorted(rows[item] for item in items))


def _last_runs(sample: Sample) -> list[list[str]]:
    """The items of the answer, and the last items without a word between them of the message before it."""
    runs = []
    for message in sample.messages[-2:]:
        parts = groupby(message.content, key=lambda part: part.type == "item")
        of_message = [[part.data["id"] for part in group] for is_item, group in parts if is_item]
        runs += of_message if message.role == "assistant" else of_message[-1:]
    return runs


def _digest(texts: dict[str, str], meetings: list[np.ndarray], settings: list[int]) -> str:
    state = xxhash.xxh3_128(canonical_json([texts, settings]).encode())
    # The order of shards and samples changes nothing.
    for line in sorted(meeting.tobytes() for meeting in meetings):
        state.update(line + b"|")
    return state.hexdigest()
