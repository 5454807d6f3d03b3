"""Free text: n-grams shared with references, exact answers, and how well text is predicted.

References are several for each sample, any of which will do; BLEU and chrF are on the usual scale of 0 to 100.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamm.core.errors import DataError
from megamm.metrics.bootstrap import Statistic
from megamm.metrics.libraries import library
from megamm.metrics.pairs import check_pairs

# Of sacrebleu's tokenizers those that need no further package and no download.
BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str = "13a") -> float:
    """Corpus BLEU in [0, 100] with sacrebleu's defaults: up to 4-grams, exponential smoothing, case kept.

    Args:
        predictions: Answers as plain text.
        references: Several for each.
        tokenize: `13a` for most languages, `zh` for Chinese, `char`, `intl` or `none`. Figures of different ones do not compare.

    Raises:
        DataError: There are none, not one for each sample, a sample without references or with a blank one, or another tokenizer.
        MegaMMError: sacrebleu is not installed.

    Source: Post, A call for clarity in reporting BLEU scores (2018); sacrebleu.
    """
    return bleu_statistic(predictions, references, tokenize=tokenize)(np.arange(len(references)))


def bleu_statistic(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str = "13a") -> Statistic:
    """`bleu` over selected samples, from n-grams that are counted once.

    Raises:
        DataError: As `bleu`.
        MegaMMError: sacrebleu is not installed.
    """
    if tokenize not in BLEU_TOKENIZERS:
        raise DataError(f"BLEU tokenizer {tokenize!r} is not known; the tokenizers are {', '.join(BLEU_TOKENIZERS)}")
    # `force`: answers that end in " ." are scored as they are, without a warning that guesses they were tokenized.
    return _corpus_statistic(library("sacrebleu.metrics").BLEU(tokenize=tokenize, force=True), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF in [0, 100]: F2 of shared character n-grams up to 6, white space left out. Serves every language as it is written.

    Raises:
        DataError: There are none, not one for each sample, or a sample without references or with a blank one.
        MegaMMError: sacrebleu is not installed.

    Source: Popović, chrF: character n-gram F-score for automatic MT evaluation (2015); sacrebleu.
    """
    return chrf_statistic(predictions, references)(np.arange(len(references)))


def chrf_statistic(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """`chrf` over selected samples, from n-grams that are counted once.

    Raises:
        DataError: As `chrf`.
        MegaMMError: sacrebleu is not installed.
    """
    return _corpus_statistic(library("sacrebleu.metrics").CHRF(), predictions, references)


def exact_matches(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """Whether each answer is one of its references, bool[N]; white space at the ends and its kind between words do not count, case does.

    Raises:
        DataError: There are none, not one for each sample, or a sample without references or with a blank one.
    """
    check_references(predictions, references)
    return np.array([_plain(answer) in set(map(_plain, wanted)) for answer, wanted in zip(predictions, references, strict=True)])


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of `exact_matches`.

    Raises:
        DataError: As `exact_matches`.
    """
    return float(exact_matches(predictions, references).mean())


def constant_exact_match(references: Sequence[Sequence[str]]) -> float:
    """Exact match of always giving the answer that suits most samples.

    Raises:
        DataError: There are none, or a sample without references or with a blank one.
    """
    check_references(references, references)
    suits = Counter(answer for wanted in references for answer in set(map(_plain, wanted)))
    return max(suits.values()) / len(references)


def perplexity(nats: float, num_tokens: int) -> float:
    """`exp(nats / num_tokens)`: among how many equally likely tokens the model is torn; depends on the tokenizer.

    Args:
        nats: Negative log-likelihood of all tokens together.
        num_tokens: How many were predicted.

    Raises:
        DataError: No tokens, or a likelihood that is no number.
    """
    try:
        return math.exp(_share(nats, num_tokens, "tokens"))
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """`nats / (ln 2 · num_bytes)`: compares models of different tokenizers on the same text.

    Args:
        nats: Negative log-likelihood of the whole text.
        num_bytes: The text's length in UTF-8.

    Raises:
        DataError: No bytes, or a likelihood that is no number.
    """
    return _share(nats, num_bytes, "bytes") / math.log(2)


def check_references(predictions: Sequence[Any], references: Sequence[Sequence[str]]) -> None:
    """Refuse anything but an answer and a list of filled references for each sample.

    Raises:
        DataError: There are none, not one for each sample, or a sample without references or with a blank one.
    """
    check_pairs(predictions, references)
    for index, wanted in enumerate(references):
        # A plain string would pass for a list of references of one character each.
        if isinstance(wanted, str) or not wanted or not all(text.strip() for text in wanted):
            raise DataError(f"sample {index} has references {str(wanted)[:80]!r}; give a list of one or more texts, none of them blank")


def _corpus_statistic(metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    check_references(predictions, references)
    most = max(map(len, references))
    streams = [[wanted[number] if number < len(wanted) else None for wanted in references] for number in range(most)]
    # What sacrebleu's own significance tests resample; its public functions count all n-grams anew each time.
    counts = np.array(metric._extract_corpus_statistics(list(predictions), streams), dtype=np.int64)
    return lambda indices: float(metric._compute_score_from_stats(counts[indices].sum(axis=0).tolist()).score)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _share(nats: float, count: int, unit: str) -> float:
    if count < 1 or math.isnan(nats):
        raise DataError(f"{nats} nats over {count} {unit} have no mean; a likelihood needs at least one of them and must be a number")
    return nats / count
