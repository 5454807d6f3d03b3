"""What items are alike in: the words that describe them, and what they are met with."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megamm.core.errors import ConfigError

_NUM_DIMS = 64
"""Of the words' part and of the meetings' part, each."""

_NUM_HASHES = 1 << 18
_SMOOTHING = 0.75
"""Power on how often an item is met at all: without it rare items would be alike for meeting once."""


def item_features(texts: Sequence[str], meetings: Sequence[np.ndarray], *, seed: int) -> np.ndarray:
    """Vectors of items that are near where texts or company are alike.

    Both halves have length 1, or 0 where nothing is known: no text, or never met.

    Args:
        texts: What describes each item; maybe empty.
        meetings: Places in `texts` of items that were met together, such as those of a basket.
        seed: Of the projections.

    Returns:
        float64[N, D].

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    return np.hstack([_unit(_text_part(texts, seed)), _unit(_meeting_part(meetings, len(texts), seed))])


def sklearn_module(name: str) -> Any:
    """A module of scikit-learn, which nothing but learning a code needs.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise ConfigError("codes of items are learned with scikit-learn, which is not installed; pip install 'megamm[prepare]'") from error


def _text_part(texts: Sequence[str], seed: int) -> np.ndarray:
    """TF-IDF of hashed character n-grams of words, so that spellings, plurals and colours count, projected."""
    extraction = sklearn_module("feature_extraction.text")
    hashing = extraction.HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=_NUM_HASHES, alternate_sign=False, norm=None)
    counts = hashing.transform(texts)
    # Most hashes are nobody's, and would cost as much as the others.
    used = counts[:, np.unique(counts.indices)]
    return _project(extraction.TfidfTransformer(sublinear_tf=True).fit_transform(used) if used.nnz else used, seed)


def _meeting_part(meetings: Sequence[np.ndarray], num_items: int, seed: int) -> np.ndarray:
    """Positive pointwise mutual information of meeting, projected.

    Source: Levy, Goldberg and Dagan, "Improving Distributional Similarity with Lessons Learned from Word Embeddings" (2015), equation 3.
    """
    from scipy import sparse  # comes with scikit-learn

    sizes = np.array([len(meeting) for meeting in meetings], dtype=np.int64)
    rows = np.repeat(np.arange(len(meetings)), sizes)
    columns = np.concatenate([np.zeros(0, dtype=np.int64), *meetings])
    # A pair in a basket of a hundred says less than two things bought alone.
    met = sparse.csr_matrix((1 / np.sqrt(sizes[rows]), (rows, columns)), shape=(len(meetings), num_items))
    # An item meets itself as well: else two that are only ever met together would have nothing in common.
    pairs = (met.T @ met).tocoo()
    often = np.bincount(pairs.row, pairs.data, num_items)
    smooth = often**_SMOOTHING
    information = np.log(pairs.data * smooth.sum() / (often[pairs.row] * smooth[pairs.col]))
    is_positive = information > 0
    entries = information[is_positive], (pairs.row[is_positive], pairs.col[is_positive])
    table = sparse.csr_matrix(entries, shape=(num_items, num_items))
    return _project(table, seed)


def _project(table: Any, seed: int) -> np.ndarray:
    """float64[N, D]: rows of a sparse table on its first singular directions, weighed by the roots of the singular values."""
    num_dims = min(_NUM_DIMS, min(table.shape) - 1)
    if num_dims < 1 or table.nnz == 0:
        return np.zeros((table.shape[0], 1))
    found = sklearn_module("decomposition").TruncatedSVD(num_dims, n_iter=7, random_state=seed).fit(table)
    # A direction of no value is rounding, which the root would blow up.
    kept = found.singular_values_ > 1e-6 * found.singular_values_[0]
    return np.asarray(table @ found.components_[kept].T) / np.sqrt(found.singular_values_[kept])


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    # What is left of nothing by rounding must not become a direction.
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-9)
