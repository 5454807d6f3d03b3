"""Another model's text tokenizer with its ids unchanged, so that its decoder's weights can be warm-started."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError


def read_adopted(folder: Path, taken: Collection[str]) -> dict[str, Any]:
    """Read `folder/tokenizer.json` in the form that our blocks can follow.

    What surrounds the text (a template that adds `<s>`, truncation, padding) goes, because our own template says what surrounds it. A
    special token that is spelled like one of ours keeps its id under another spelling.

    Args:
        folder: A local Hugging Face folder.
        taken: Spellings of the tokens that come behind.

    Raises:
        ConfigError: There is no `tokenizer.json`, or it is not one.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"tokenizer.adopt={folder} has no tokenizer.json; load it in transformers and save_pretrained it once")
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a tokenizer file ({error!r}); load it in transformers and save_pretrained it again") from None
    if not isinstance(vocab, dict):
        raise ConfigError(f"{path} is a {tokenizer['model'].get('type')} model; only tokenizers with a vocabulary of BPE or WordPiece fit")
    for name in ("post_processor", "truncation", "padding"):
        tokenizer[name] = None
    for token in added:
        spelling = token["content"]
        if spelling in taken:
            token["content"] = f"<|adopted_{spelling.strip('<|>')}|>"
            if spelling in vocab:
                vocab[token["content"]] = vocab.pop(spelling)
    _leave_first_words_alone(tokenizer.get("pre_tokenizer"))
    return tokenizer


def text_size(tokenizer: dict[str, Any]) -> int:
    """Ids that a tokenizer uses, counted from 0 to its last one."""
    return 1 + max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])])


def _leave_first_words_alone(pre_tokenizer: dict[str, Any] | None) -> None:
    """Metaspace that prefixes only a text's very start: behind a control token, where our text always stands, it adds nothing."""
    if pre_tokenizer is None:
        return
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
    for child in pre_tokenizer.get("pretokenizers", ()):
        _leave_first_words_alone(child)
