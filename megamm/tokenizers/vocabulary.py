"""One id space for everything a model reads and writes: text, control, locations and codes.

Ids follow from the block sizes by arithmetic alone, so a code never needs a look-up of its string, and a tokenizer, a model and an export
that agree on the sizes agree on every id.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

from megamm.config.schema import Tokenizer
from megamm.core.errors import ConfigError, DataError

CONTROL_NAMES = (
    "pad",
    "bos",
    "eos",
    "system",
    "user",
    "assistant",
    "end",
    "image_start",
    "image",
    "image_end",
    "audio_start",
    "audio",
    "audio_end",
    "box_start",
    "box_end",
    "mask_start",
    "mask_end",
)
"""Control tokens in the order of their ids. New names go to the end, where they take a reserved id."""

NUM_CONTROL = 64
"""Ids of the control block, reserved ones included, so that a later control token moves no code."""

SIZE_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this: matrix units want it, and ranks of a sharded head divide it."""


class Block(NamedTuple):
    """A run of ids: `start <= id < start + size`."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the blocks; every id follows from them.

    Attributes:
        text: Ids of the text tokenizer.
        location: Bins of a coordinate.
        image: Size of the picture code book.
        audio_levels: Levels of the residual sound code.
        audio_codes: Entries a level of the sound code book.
        item_levels: Levels of semantic item ids.
        item_codes: Entries a level of semantic item ids.
        spare: Ids kept free for later; padding to `SIZE_MULTIPLE` comes on top.
    """

    text: int
    location: int = 0
    image: int = 0
    audio_levels: int = 0
    audio_codes: int = 0
    item_levels: int = 0
    item_codes: int = 0
    spare: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"vocabulary {field.name}={value!r} is not a count; give an integer of 0 or more")
        if self.text == 0:
            raise ConfigError("vocabulary text=0: a vocabulary needs text pieces; train or adopt a tokenizer first")

    @classmethod
    def from_config(cls, config: Tokenizer, text_size: int) -> Vocabulary:
        """Lay out the blocks that `config` asks for behind `text_size` ids of text."""
        return cls(
            text=text_size,
            location=config.location_bins,
            image=config.image_codes,
            audio_levels=config.audio_levels,
            audio_codes=config.audio_codes,
            item_levels=config.item_levels,
            item_codes=config.item_codes,
            spare=config.spare,
        )

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks in the order of their ids; together they cover every id once."""
        sizes = {
            "text": self.text,
            "control": NUM_CONTROL,
            "location": self.location,
            "image": self.image,
            "audio": self.audio_levels * self.audio_codes,
            "item": self.item_levels * self.item_codes,
        }
        used = sum(sizes.values()) + self.spare
        sizes["spare"] = self.spare + -used % SIZE_MULTIPLE
        blocks, start = [], 0
        for name, size in sizes.items():
            blocks.append(Block(name, start, size))
            start += size
        return tuple(blocks)

    @cached_property
    def _by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.blocks}

    @cached_property
    def size(self) -> int:
        """Number of ids, a multiple of `SIZE_MULTIPLE`: rows of the embedding."""
        return sum(block.size for block in self.blocks)

    @cached_property
    def _starts(self) -> list[int]:
        return [block.start for block in self.blocks]

    def block(self, name: str) -> Block:
        """The block called `name`.

        Raises:
            ConfigError: There is no such block.
        """
        if name not in self._by_name:
            raise ConfigError(f"no block is called {name!r}; there are {', '.join(self._by_name)}")
        return self._by_name[name]

    def control_id(self, name: str) -> int:
        """Id of the control token `<|name|>`.

        Raises:
            ConfigError: There is no such control token.
        """
        if name not in CONTROL_NAMES:
            raise ConfigError(f"no control token is called {name!r}; there are {', '.join(CONTROL_NAMES)}")
        return self.block("control").start + CONTROL_NAMES.index(name)

    def location_id(self, bin_index: int) -> int:
        """Id of a coordinate's bin."""
        return self._id("location", bin_index, self.location)

    def image_id(self, code: int) -> int:
        """Id of an entry of the picture code book."""
        return self._id("image", code, self.image)

    def audio_id(self, level: int, code: int) -> int:
        """Id of an entry of the sound code book at a level of the residual code."""
        self._check("audio level", level, self.audio_levels)
        return self._id("audio", code, self.audio_codes, offset=level * self.audio_codes)

    def item_id(self, level: int, code: int) -> int:
        """Id of an entry of the item code at a level."""
        self._check("item level", level, self.item_levels)
        return self._id("item", code, self.item_codes, offset=level * self.item_codes)

    def describe(self, token_id: int) -> tuple[str, int]:
        """Block name and offset inside it: the inverse of the functions above.

        Raises:
            DataError: The id is outside the vocabulary.
        """
        self._check("token id", token_id, self.size)
        # Empty blocks share their start with the next one; the right-most start at or below the id is the block that holds it.
        block = self.blocks[bisect_right(self._starts, token_id) - 1]
        return block.name, token_id - block.start

    def token_string(self, token_id: int) -> str:
        """The token's spelling in tokenizer files, such as `<|image_start|>`, `<|loc_12|>` or `<|audio_0_7|>`.

        Raises:
            DataError: The id is outside the vocabulary, or a text piece, which only the text tokenizer can spell.
        """
        name, offset = self.describe(token_id)
        match name:
            case "control":
                return f"<|{CONTROL_NAMES[offset] if offset < len(CONTROL_NAMES) else f'reserved_{offset}'}|>"
            case "location":
                return f"<|loc_{offset}|>"
            case "image" | "spare":
                return f"<|{name}_{offset}|>"
            case "audio" | "item":
                level, code = divmod(offset, self.audio_codes if name == "audio" else self.item_codes)
                return f"<|{name}_{level}_{code}|>"
        raise DataError(f"token id {token_id} is a text piece; decode it with the text tokenizer")

    def to_json(self) -> dict[str, Any]:
        """Sizes, with the blocks and control tokens spelled out for readers that are not this class."""
        return {
            "sizes": asdict(self),
            "size": self.size,
            "blocks": {block.name: [block.start, block.size] for block in self.blocks},
            "control": {name: self.control_id(name) for name in CONTROL_NAMES},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Vocabulary:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: Fields are missing, or the layout that the file spells out is not the one that its sizes give here.
        """
        try:
            vocabulary = cls(**value["sizes"])
        except (TypeError, KeyError) as error:
            raise ConfigError(f"vocabulary without usable sizes ({error}); write the tokenizer folder again") from None
        expected = vocabulary.to_json()
        for name in ("size", "blocks", "control"):
            if value.get(name) != expected[name]:
                raise ConfigError(
                    f"vocabulary {name}={value.get(name)} is not what its sizes give, {expected[name]}; write the tokenizer folder again"
                )
        return vocabulary

    def _id(self, block: str, code: int, num_codes: int, *, offset: int = 0) -> int:
        self._check(f"{block} code", code, num_codes)
        return self.block(block).start + offset + code

    @staticmethod
    def _check(what: str, value: int, bound: int) -> None:
        if not 0 <= value < bound:
            raise DataError(f"{what} {value} is not in [0, {bound}); the vocabulary was laid out with {bound}")
