"""Text pieces: a sentencepiece BPE model, and the same model in the form that Hugging Face's `tokenizers` runs."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import sentencepiece
import tokenizers

from megamm.core.errors import ConfigError

SPACE = "▁"
"""What sentencepiece writes for a space (U+2581). A text that holds this very character reads back with a space."""

TRAIN_BYTES = 256 << 20
"""Text that training looks at, at most: sentencepiece keeps all of it in memory."""

_NUM_FIXED = 257
"""Pieces of every model: `<unk>` and the 256 bytes."""

_SENTENCE_CHARACTERS = 4096
"""Longer texts are cut for training, because sentencepiece drops what is longer than its `max_sentence_length`."""


def train_pieces(texts: Iterable[str], text_size: int, max_bytes: int = TRAIN_BYTES) -> bytes:
    """Train byte-fallback BPE; equal texts give equal bytes.

    Args:
        texts: The corpus. Past `max_bytes` it is thinned evenly from its beginning to its end.
        text_size: Pieces wanted, bytes included. A corpus with too few different words gets fewer.
        max_bytes: UTF-8 bytes to train on.

    Returns:
        A serialized sentencepiece model.

    Raises:
        ConfigError: `text_size` leaves no room for characters, or there is no text.
    """
    max_characters = (text_size - _NUM_FIXED) // 2
    if max_characters < 1:
        raise ConfigError(f"tokenizer.text_size={text_size} leaves no room beside the 256 bytes; set at least {_NUM_FIXED + 2}")
    sentences = _sentences(_thin(texts, max_bytes), max_characters)
    if not any(sentence.strip() for sentence in sentences):
        raise ConfigError("no text to train a tokenizer from; name shards whose samples hold text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=text_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _SENTENCE_CHARACTERS,
            # The only fixed piece besides the bytes: sentencepiece insists on it, byte fallback never yields it.
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"sentencepiece cannot train {text_size} pieces on this text: {error}") from error
    return model.getvalue()


def to_tokenizers(model: bytes) -> dict[str, Any]:
    """Convert a model of `train_pieces` to the content of a `tokenizer.json` with the same ids and the same segmentation.

    sentencepiece joins the two neighbours whose union has the best score; `tokenizers` joins by a ranked list of pairs. So every way to
    split a piece into two pieces becomes a pair, ranked by the score of the union.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    spellings = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    normal = [index for index in range(len(spellings)) if not (processor.is_unknown(index) or processor.is_byte(index))]
    known = {spellings[index] for index in normal}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (spellings[index] for index in sorted(normal, key=lambda index: -processor.get_score(index)))
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    vocab = {spelling: index for index, spelling in enumerate(spellings)}
    unknown = spellings[processor.unk_id()]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace(SPACE, " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    return json.loads(tokenizer.to_str())


def _thin(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Keep every 2^k-th text, with the least k that fits into `max_bytes`."""
    kept: list[str] = []
    num_bytes, stride = 0, 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        num_bytes += len(text.encode())
        while num_bytes > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            num_bytes = sum(len(text.encode()) for text in kept)
    return kept


def _sentences(texts: list[str], max_characters: int) -> list[str]:
    """Cut texts to a length that sentencepiece accepts, and at characters that get no piece of their own.

    Left to itself sentencepiece refuses a corpus with more characters than pieces, and drops a whole text for one NUL or U+2585. Rare
    characters fall back to bytes.
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    kept = {character for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_characters]}
    cut_at = str.maketrans(dict.fromkeys((counts.keys() - kept) | {"\u2585"}, "\0"))
    return [
        run[start : start + _SENTENCE_CHARACTERS]
        for text in texts
        for run in text.translate(cut_at).split("\0")
        for start in range(0, len(run), _SENTENCE_CHARACTERS)
    ]
