"""The text tokenizer and its folder: trained or adopted, with the whole vocabulary laid out behind its pieces.

The folder is what `megamm tokenizer` writes, what training reads and what the export ships: `tokenizer.json`, `tokenizer_config.json` and
`chat_template.jinja` load in transformers, `tokenizer.model` (trained ones) in sentencepiece, `vocabulary.json` and `items.jsonl` (where
there are items) here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from megamm.config.schema import Tokenizer
from megamm.core.errors import ConfigError, DataError
from megamm.core.files import atomic_file, canonical_json, digest_text
from megamm.tokenizers.adopted import read_adopted, text_size
from megamm.tokenizers.chat_template import CHAT_TEMPLATE, TEMPLATE_VERSION
from megamm.tokenizers.items import ITEMS_FILE, ItemTable
from megamm.tokenizers.pieces import to_tokenizers, train_pieces
from megamm.tokenizers.vocabulary import CONTROL_NAMES, Vocabulary

_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", ITEMS_FILE, "vocabulary.json")
"""All that a tokenizer folder may hold, in the order of writing: with its last file it is complete."""

_PROBES = ("seven", " two  words\n", "12 + 30 = 42", "数字 七", "🙂é")
"""Texts that a tokenizer must treat alike alone and behind a control token."""


class TextTokenizer:
    """Text to ids and back, as training and the exported folder agree on them. Stateless after loading.

    Attributes:
        vocabulary: The id space that the text pieces are a block of.
        items: The items that it can write; None where it knows none.
        fingerprint: Hexadecimal digest of everything that decides which ids a sample gets.
    """

    def __init__(self, tokenizer_json: dict[str, Any], vocabulary: Vocabulary, chat_template: str, items: ItemTable | None = None) -> None:
        self.vocabulary = vocabulary
        self.items = items
        if items is not None:
            items.check_fits(vocabulary)
        parts = [tokenizer_json, vocabulary.to_json(), chat_template, TEMPLATE_VERSION, *([] if items is None else [items.digest])]
        self.fingerprint = digest_text(canonical_json(parts))
        # Without the strings of our blocks, and with an adopted tokenizer's own special tokens read as text, nothing that a user
        # writes can become a control token.
        pieces = {**tokenizer_json, "added_tokens": [token for token in tokenizer_json["added_tokens"] if token["id"] < vocabulary.text]}
        self._pieces = tokenizers.Tokenizer.from_str(json.dumps(pieces))
        self._pieces.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library's pickle forgets it: a copy in another process would read an adopted tokenizer's control strings in a user's text.
        self._pieces.encode_special_tokens = True

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read a folder that `train` or `adopt` wrote.

        Raises:
            ConfigError: A file is missing or damaged.
        """
        try:
            tokenizer_json = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocabulary_json = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
            chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ConfigError(f"tokenizer folder {folder} lacks {Path(error.filename).name}; write it with `megamm tokenizer`") from None
        except ValueError as error:
            raise ConfigError(f"tokenizer folder {folder} holds damaged JSON ({error}); write it again with `megamm tokenizer`") from None
        items = ItemTable.load(folder / ITEMS_FILE) if (folder / ITEMS_FILE).exists() else None
        return cls(tokenizer_json, Vocabulary.from_json(vocabulary_json), chat_template, items)

    def encode(self, text: str) -> list[int]:
        """Ids of the text block; control strings in `text` are plain characters.

        Raises:
            DataError: It is no whole Unicode, as words of a command line in another encoding are.
        """
        try:
            return self._pieces.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise DataError(f"the text {text[:40]!r} is no whole Unicode; write it as UTF-8") from None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """First character and the one behind the last of each token of `encode(text)`; pieces of one character share its span."""
        return [tuple(span) for span in self._pieces.encode(text, add_special_tokens=False).offsets]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the text-block ids in `ids`; ids of other blocks are skipped."""
        return self._pieces.decode([int(token_id) for token_id in ids if 0 <= token_id < self.vocabulary.text])


def train(texts: Iterable[str], config: Tokenizer, folder: Path, *, items: ItemTable | None = None) -> TextTokenizer:
    """Train text pieces on `texts` and write the tokenizer folder, with `items` in it where there are any.

    Raises:
        ConfigError: No text, an impossible `text_size`, items of other codes than `config`'s, or a folder that already holds another
            tokenizer.
    """
    model = train_pieces(texts, config.text_size)
    tokenizer_json = to_tokenizers(model)
    vocabulary = Vocabulary.from_config(config, len(tokenizer_json["model"]["vocab"]))
    return _write_folder(tokenizer_json, vocabulary, folder, {"tokenizer.model": model}, items=items)


def adopt(config: Tokenizer, folder: Path, *, items: ItemTable | None = None) -> TextTokenizer:
    """Keep the ids of the Hugging Face tokenizer in the local folder `config.adopt`, with our blocks behind them.

    Raises:
        ConfigError: That folder has no usable `tokenizer.json`, the items have other codes than `config`'s, or `folder` already holds
            another tokenizer.
    """
    tokenizer_json = read_adopted(Path(config.adopt), _block_strings(Vocabulary.from_config(config, 1)))
    vocabulary = Vocabulary.from_config(config, text_size(tokenizer_json))
    return _write_folder(tokenizer_json, vocabulary, folder, {}, items=items)


def _block_strings(vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.token_string(token_id) for token_id in range(vocabulary.text, vocabulary.size)]


def _write_folder(
    tokenizer_json: dict[str, Any], vocabulary: Vocabulary, folder: Path, files: dict[str, bytes], *, items: ItemTable | None
) -> TextTokenizer:
    """Add our blocks, check that the result keeps its word, and write what is not there yet."""
    tokenizer_json["added_tokens"] += [
        {
            "id": token_id,
            "content": vocabulary.token_string(token_id),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            # Codes are part of an answer, so skipping special tokens must leave them in.
            "special": vocabulary.describe(token_id)[0] == "control",
        }
        for token_id in range(vocabulary.text, vocabulary.size)
    ]
    tokenizer = TextTokenizer(tokenizer_json, vocabulary, CHAT_TEMPLATE, items)
    _check_ids(tokenizer_json, tokenizer)
    contents = {
        **files,
        "tokenizer.json": (json.dumps(tokenizer_json, ensure_ascii=False, indent=1) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(_transformers_config(), indent=2, sort_keys=True) + "\n").encode(),
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
        "vocabulary.json": (json.dumps(vocabulary.to_json(), indent=2) + "\n").encode(),
        **({} if items is None else {ITEMS_FILE: items.to_bytes()}),
    }
    for name in _FILES:
        if (path := folder / name).exists() and path.read_bytes() != contents.get(name):
            raise ConfigError(f"{folder} already holds another tokenizer ({name} differs); name an empty folder or remove that one")
    for name in _FILES:
        if name in contents and not (folder / name).exists():
            with atomic_file(folder / name) as file:
                file.write(contents[name])
    return tokenizer


def _check_ids(tokenizer_json: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Refuse a tokenizer that gives its tokens other ids than ours, or whose text depends on what stands before it."""
    full = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json))
    vocabulary = tokenizer.vocabulary
    for token_id in range(vocabulary.text, vocabulary.size):
        string = vocabulary.token_string(token_id)
        if (found := full.token_to_id(string)) != token_id:
            raise ConfigError(
                f"token {string} would get id {found}, not {token_id}: it has holes in its ids or a piece of that name; adopt another"
            )
    for probe in _PROBES:
        expected = [vocabulary.control_id("user"), *tokenizer.encode(probe), vocabulary.control_id("end")]
        if (found := full.encode(f"<|user|>{probe}<|end|>", add_special_tokens=False).ids) != expected:
            raise ConfigError(
                f"text {probe!r} has ids {expected[1:-1]} alone and {found[1:-1]} behind a control token; adopt another tokenizer"
            )


def _transformers_config() -> dict[str, Any]:
    """What AutoTokenizer reads beside `tokenizer.json`; it names the control tokens `image_token`, `audio_token` and so on."""
    named = ("pad", "bos", "eos")
    return {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": f"<|{name}|>" for name in named},
        "extra_special_tokens": {f"{name}_token": f"<|{name}|>" for name in CONTROL_NAMES if name not in named},
    }
