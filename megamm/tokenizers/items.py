"""The items of a catalogue and their codes: one code a level, unique to an item, one id of the vocabulary each.

`items.jsonl` lies in the tokenizer's folder: a line that says what follows, then a line an item, sorted by its id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megamm.core.errors import ConfigError, DataError
from megamm.core.files import canonical_json, digest_text
from megamm.tokenizers.vocabulary import Vocabulary

ITEMS_FILE = "items.jsonl"
"""Name of the table in a tokenizer's folder, and of the list of items beside shards that it is made from."""

FORMAT = 1

_MAX_CODES = 1 << 62
"""Codes of an item are looked up as one number."""


@dataclass(frozen=True, eq=False)
class ItemTable:
    """Items and their codes, both ways. Frozen; look-ups are built when they are first used.

    Attributes:
        ids: Sorted, without repeats.
        texts: What describes each item; maybe empty.
        codes: int32[N, levels], no row twice.
        num_codes: Codes a level.
        made_from: Digest of all that the codes were learned from; empty where they were given.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    codes: np.ndarray
    num_codes: int
    made_from: str = ""

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or not len(self.ids) == len(self.texts) == len(self.codes) > 0 or not self.num_levels:
            raise DataError(f"{len(self.ids)} items, {len(self.texts)} texts and codes of shape {self.codes.shape} are no table of items")
        if any(first >= second for first, second in zip(self.ids, self.ids[1:], strict=False)):
            raise DataError("the items of a table are not sorted by id without repeats; make it again with `megamm tokenizer`")
        if self.num_codes**self.num_levels > _MAX_CODES:
            raise ConfigError(
                f"item_codes={self.num_codes} at item_levels={self.num_levels} are more combinations than 2^62; take fewer levels or codes"
            )
        if self.codes.min() < 0 or self.codes.max() >= self.num_codes:
            raise DataError(f"item codes reach from {self.codes.min()} to {self.codes.max()}, the table has {self.num_codes} a level")
        if (repeats := np.flatnonzero(np.diff(self._sorted_keys) == 0)).size:
            one, other = (self.ids[row] for row in self._by_key[repeats[0] : repeats[0] + 2])
            raise DataError(f"items {one!r} and {other!r} have the same codes; make the table again with `megamm tokenizer`")

    @property
    def num_levels(self) -> int:
        """Codes of an item, and tokens."""
        return self.codes.shape[1]

    @cached_property
    def digest(self) -> str:
        """Of all items, texts and codes: 32 hexadecimal digits."""
        return digest_text(canonical_json([self.ids, self.texts, self.codes.tolist(), self.num_codes]))

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._rows

    def row_of(self, item_id: str) -> int:
        """Place of an item in `ids`, `texts` and `codes`.

        Raises:
            DataError: There is no such item.
        """
        row = self._rows.get(item_id)
        if row is None:
            raise DataError(
                f"item {item_id!r} is not among the tokenizer's {len(self)} items; list it in {ITEMS_FILE} beside its shards and run "
                "`megamm tokenizer` into a new folder"
            )
        return row

    def codes_of(self, item_id: str) -> tuple[int, ...]:
        """Codes of an item, the coarsest first.

        Raises:
            DataError: There is no such item.
        """
        return tuple(self.codes[self.row_of(item_id)].tolist())

    def text_of(self, item_id: str) -> str:
        """What describes an item; maybe empty.

        Raises:
            DataError: There is no such item.
        """
        return self.texts[self.row_of(item_id)]

    def id_of(self, codes: Sequence[int]) -> str:
        """The item that has some codes.

        Raises:
            DataError: No item has them.
        """
        if len(codes) == self.num_levels and all(0 <= code < self.num_codes for code in codes):
            key = int(self._radix @ np.array(codes, dtype=np.int64))
            place = int(np.searchsorted(self._sorted_keys, key))
            if place < len(self) and self._sorted_keys[place] == key:
                return self.ids[self._by_key[place]]
        raise DataError(f"no item has the codes {list(codes)}; decode with megamm.inference.constrained, which writes existing items only")

    def token_ids(self, item_id: str, vocabulary: Vocabulary) -> list[int]:
        """Ids of the vocabulary that stand for an item, one a level.

        Raises:
            DataError: There is no such item, or the vocabulary has no room for its codes.
        """
        return [vocabulary.item_id(level, code) for level, code in enumerate(self.codes_of(item_id))]

    def item_of(self, token_ids: Sequence[int], vocabulary: Vocabulary) -> str:
        """The item that some ids of the vocabulary stand for: the inverse of `token_ids`.

        Raises:
            DataError: They are no item's.
        """
        start = vocabulary.block("item").start
        return self.id_of([token_id - start - level * vocabulary.item_codes for level, token_id in enumerate(token_ids)])

    def check_fits(self, vocabulary: Vocabulary) -> None:
        """Refuse a vocabulary that is laid out for other codes.

        Raises:
            ConfigError: It is.
        """
        if (vocabulary.item_levels, vocabulary.item_codes) != (self.num_levels, self.num_codes):
            raise ConfigError(
                f"{ITEMS_FILE} holds items of {self.num_levels} levels of {self.num_codes} codes, the vocabulary has "
                f"{vocabulary.item_levels} of {vocabulary.item_codes}; make both with one `megamm tokenizer`"
            )

    def to_bytes(self) -> bytes:
        """Content of `items.jsonl`."""
        head = {
            "format": FORMAT,
            "items": len(self),
            "levels": self.num_levels,
            "codes": self.num_codes,
            "made_from": self.made_from,
            "digest": self.digest,
        }
        return "".join((canonical_json(head), "\n", *self._lines())).encode()

    @classmethod
    def load(cls, path: Path) -> ItemTable:
        """Read what `to_bytes` gave.

        Raises:
            ConfigError: The file is damaged, or of another format.
        """
        fix = "make the tokenizer again with `megamm tokenizer`"
        try:
            head, _, body = path.read_bytes().decode().partition("\n")
            facts = json.loads(head)
            if facts["format"] != FORMAT:
                raise ConfigError(f"{path} has format {facts['format']}, this is {FORMAT}; {fix}")
            # Not `splitlines`: a text may hold what Unicode calls a line's end.
            items: list[dict[str, Any]] = [json.loads(line) for line in body.split("\n") if line]
            ids, texts = (tuple(item[name] for item in items) for name in ("id", "text"))
            codes = np.array([item["codes"] for item in items], dtype=np.int32)
            table = cls(ids, texts, codes, facts["codes"], facts["made_from"])
            if table.digest != facts["digest"]:
                raise ConfigError(f"{path} is not what was written (its digest differs); {fix}")
            return table
        except (ValueError, KeyError, TypeError, DataError) as error:
            raise ConfigError(f"{path} is no table of items ({error}); {fix}") from None

    def _lines(self) -> Iterator[str]:
        for item_id, text, codes in zip(self.ids, self.texts, self.codes.tolist(), strict=True):
            yield canonical_json({"id": item_id, "text": text, "codes": codes}) + "\n"

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.ids)}

    @cached_property
    def _radix(self) -> np.ndarray:
        return np.array([self.num_codes**power for power in reversed(range(self.num_levels))], dtype=np.int64)

    @cached_property
    def _by_key(self) -> np.ndarray:
        return np.argsort(self.codes @ self._radix, kind="stable")

    @cached_property
    def _sorted_keys(self) -> np.ndarray:
        return (self.codes @ self._radix)[self._by_key]
