"""CIDEr-D: do captions share those n-grams with their references that are rare elsewhere?

Implemented here because the authors' code asks for Java and a tokenizer of English before it scores anything. Words are runs of
letters and digits in lower case, in place of the Penn Treebank's; so figures compare among themselves, and only nearly with published ones.

Source: Vedantam et al., CIDEr: Consensus-based image description evaluation (2015), section 6 (CIDEr-D), with raw term counts
and idf from the references at hand, as in the authors' code (coco-caption).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from megamm.core.errors import DataError
from megamm.metrics.text import check_references

_ORDERS = range(1, 5)
_SIGMA_WORDS = 6.0
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"words": _WORD.findall, "characters": re.compile(r"\w").findall}

NGram = tuple[str, ...]


def cider_scores(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str = "words") -> NDArray[np.float64]:
    """CIDEr-D of each sample, float64[N] in [0, 10]; the corpus's is their mean (often printed × 100).

    Args:
        predictions: A caption for each picture.
        references: Several for each picture.
        tokenize: `words`, or `characters` for languages that write no space between words.

    Raises:
        DataError: Fewer than two pictures (no n-gram is rarer than another), not one caption for each, one without references or with
            a blank one, or another tokenizer.
    """
    check_references(predictions, references)
    if len(references) < 2:
        raise DataError("CIDEr-D of 1 picture is undefined: rare n-grams are those that few of several pictures have; give 2 or more")
    if tokenize not in _TOKENIZERS:
        raise DataError(f"CIDEr tokenizer {tokenize!r} is not known; the tokenizers are {', '.join(_TOKENIZERS)}")
    wanted = [[_ngrams(text, tokenize) for text in texts] for texts in references]
    num_pictures_with = Counter(ngram for captions in wanted for ngram in set().union(*captions))
    rarity = {ngram: math.log(len(references) / count) for ngram, count in num_pictures_with.items()}
    unseen = math.log(len(references))
    return np.array(
        [
            sum(_similarity(_ngrams(answer, tokenize), caption, rarity, unseen) for caption in captions) * 10 / len(captions)
            for answer, captions in zip(predictions, wanted, strict=True)
        ]
    )


def _ngrams(text: str, tokenize: str) -> Counter[NGram]:
    words = _TOKENIZERS[tokenize](unicodedata.normalize("NFC", text).lower())
    return Counter(tuple(words[start : start + order]) for order in _ORDERS for start in range(len(words) - order + 1))


def _similarity(answer: Counter[NGram], caption: Counter[NGram], rarity: dict[NGram, float], unseen: float) -> float:
    """Mean over the orders of the clipped cosine of tf-idf vectors, less where lengths differ."""
    total = 0.0
    for order in _ORDERS:
        given = {ngram: count * rarity.get(ngram, unseen) for ngram, count in answer.items() if len(ngram) == order}
        wanted = {ngram: count * rarity[ngram] for ngram, count in caption.items() if len(ngram) == order}
        norms = math.hypot(*given.values()) * math.hypot(*wanted.values())
        if norms:
            total += sum(min(weight, wanted.get(ngram, 0.0)) * wanted.get(ngram, 0.0) for ngram, weight in given.items()) / norms
    difference = _num_words(answer) - _num_words(caption)
    return total / len(_ORDERS) * math.exp(-(difference**2) / (2 * _SIGMA_WORDS**2))


def _num_words(ngrams: Counter[NGram]) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 1)
