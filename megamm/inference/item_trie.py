"""All items of a table as a trie over token ids, in a few arrays: a node is the range of sorted items that begin alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from megamm.core.errors import ConfigError
from megamm.inference.load import Loaded
from megamm.tokenizers.items import ItemTable
from megamm.tokenizers.vocabulary import Vocabulary


class Node(NamedTuple):
    """Items that begin with the same `depth` tokens: `start <= place < end` in the trie's order."""

    depth: int
    start: int
    end: int


class ItemTrie:
    """Which tokens may follow which, so that only existing items come out. Built once a table; never changes.

    Items stand in the order of their tokens; a `place` counts in it.

    Attributes:
        table: The items.
        tokens: int64[N, levels], token ids of the item at each place.
        rows: int64[N], row of `table` at each place.
        places: int64[N], place of each row of `table`.
    """

    def __init__(self, table: ItemTable, vocabulary: Vocabulary) -> None:
        """Lay the items of a table out.

        Args:
            table: Of the tokenizer.
            vocabulary: Of the tokenizer.

        Raises:
            ConfigError: The vocabulary is laid out for other codes.
        """
        table.check_fits(vocabulary)
        first = np.array([vocabulary.item_id(level, 0) for level in range(table.num_levels)])
        self.table = table
        self.rows = np.lexsort(table.codes.T[::-1])
        self.tokens = table.codes[self.rows] + first
        self.places = np.argsort(self.rows)
        # Where a node of each depth begins: where the first so many tokens are not those of the item before.
        differs = np.cumsum(self.tokens[1:] != self.tokens[:-1], axis=1) > 0
        self._borders = [np.array([0, len(self.rows)])]
        for depth in range(table.num_levels):
            self._borders.append(np.concatenate([[0], np.flatnonzero(differs[:, depth]) + 1, [len(self.rows)]]))

    @classmethod
    def of(cls, loaded: Loaded) -> ItemTrie:
        """The trie of the items that a model knows.

        Raises:
            ConfigError: It knows none.
        """
        if loaded.tokenizer.items is None:
            raise ConfigError(
                f"the tokenizer of {loaded.source} knows no items; set tokenizer.item_levels and item_codes, put items.jsonl beside the "
                "training shards and run `megamm tokenizer` before training"
            )
        return cls(loaded.tokenizer.items, loaded.tokenizer.vocabulary)

    @property
    def num_items(self) -> int:
        """Items, all of them leaves."""
        return len(self.rows)

    @property
    def num_levels(self) -> int:
        """Tokens of an item."""
        return self.tokens.shape[1]

    def borders(self, depth: int) -> np.ndarray:
        """int64[nodes + 1]: the place where each node of a depth begins, and the number of items."""
        return self._borders[depth]

    def walk(self, token_ids: Iterable[int]) -> Node | None:
        """The node that some tokens lead to; None where no item begins with them."""
        depth, start, end = 0, 0, self.num_items
        for token_id in token_ids:
            if depth == self.num_levels:
                return None
            column = self.tokens[start:end, depth]
            start, end = start + int(np.searchsorted(column, token_id)), start + int(np.searchsorted(column, token_id, side="right"))
            if start == end:
                return None
            depth += 1
        return Node(depth, start, end)

    def next_tokens(self, node: Node, without: np.ndarray) -> np.ndarray:
        """int64[children]: tokens that lead on to an item.

        Args:
            node: Above the last level.
            without: Ascending places of items that must not come out.
        """
        borders = self._borders[node.depth + 1]
        own = borders[np.searchsorted(borders, node.start) : np.searchsorted(borders, node.end) + 1]
        num_left = np.diff(own) - np.diff(np.searchsorted(without, own))
        return self.tokens[own[:-1][num_left > 0], node.depth]

    def places_of(self, item_ids: Sequence[str]) -> np.ndarray:
        """int64: ascending places of some items, without repeats.

        Raises:
            DataError: One of them is unknown.
        """
        return np.unique(self.places[[self.table.row_of(item) for item in item_ids]]) if item_ids else np.zeros(0, dtype=np.int64)

    def item_at(self, place: int) -> str:
        """Id of the item at a place."""
        return self.table.ids[self.rows[place]]
