"""Codes for items: residual k-means whose cells have room for so many items, so that no two items get the same codes.

The first code names the nearest of some centres, the next one the nearest centre of what is left, and so on. A code takes no more items
than the levels after it can tell apart, at the last level one; who finds a code full takes the next nearest.

Source: Rajput et al., "Recommender Systems with Generative Retrieval" (2023) for items as codes of a residual quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megamm.core.errors import ConfigError
from megamm.tokenizers.item_features import sklearn_module

_NUM_FIT = 100_000
"""Items that centres are found from; more do not move them by much."""

_CHUNK_ITEMS = 1 << 16

_FAR = 1e300
"""Distance to a code that has no centre: it is taken when all that have one are full."""


def learn_codes(features: np.ndarray, num_levels: int, num_codes: int, *, seed: int) -> np.ndarray:
    """Give every item codes of its own, the nearer the features the longer the common beginning.

    Equal features and seeds give equal codes on machines whose linear algebra rounds alike; elsewhere a distance that differs in its
    last place may move an item. So codes are made once and kept with the tokenizer.

    Args:
        features: float[N, D], in an order that says nothing: of items at equal distances the first ones choose first.
        num_levels: Codes of an item.
        num_codes: Codes a level.
        seed: Of the centres' beginnings.

    Returns:
        int32[N, num_levels], no row twice.

    Raises:
        ConfigError: There are more items than codes, or scikit-learn is not installed.
    """
    num_items = len(features)
    if num_items > num_codes**num_levels:
        raise ConfigError(
            f"{num_items} items do not fit into tokenizer.item_levels={num_levels} levels of item_codes={num_codes} "
            f"({num_codes**num_levels} combinations); raise one of them"
        )
    rest = np.array(features, dtype=np.float64)
    codes = np.zeros((num_items, num_levels), dtype=np.int32)
    cells = np.zeros(num_items, dtype=np.int64)
    for level in range(num_levels):
        centres = _find_centres(rest, num_codes, seed + level)
        room = num_codes ** (num_levels - 1 - level)
        for members in _groups(cells):
            codes[members, level] = _place(rest[members], centres, num_codes, room)
        chosen = codes[:, level]
        has_centre = chosen < len(centres)
        rest[has_centre] -= centres[chosen[has_centre]]
        cells = cells * num_codes + chosen
    return codes


def _find_centres(points: np.ndarray, num_codes: int, seed: int) -> np.ndarray:
    """float64[K, D]: as many centres as codes, or as different points where these are fewer."""
    cluster = sklearn_module("cluster")
    # Their order says nothing, so every so many-th is a random choice.
    points = points[:: -(-len(points) // _NUM_FIT)]
    different = np.unique(points, axis=0)
    if len(different) <= num_codes:
        return different
    means = cluster.KMeans(num_codes, n_init=4, max_iter=100, random_state=seed, algorithm="lloyd").fit(points)
    return means.cluster_centers_


def _groups(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of each cell, in ascending order."""
    order = np.argsort(cells, kind="stable")
    borders = np.flatnonzero(np.diff(cells[order])) + 1
    yield from np.split(order, borders)


def _place(points: np.ndarray, centres: np.ndarray, num_codes: int, room: int) -> np.ndarray:
    """A code for each point, none more than `room` times: the nearest that is not full, the nearest points first."""
    codes = np.full(len(points), -1, dtype=np.int32)
    left = np.full(num_codes, room, dtype=np.int64)
    waiting = np.arange(len(points))
    # Every round places all who wait, or fills a code.
    while waiting.size:
        wanted, distances = _nearest(points[waiting], centres, left > 0)
        order = np.lexsort((waiting, distances, wanted))
        wanted = wanted[order]
        rank = np.arange(len(order)) - np.searchsorted(wanted, wanted)
        is_in = rank < left[wanted]
        codes[waiting[order[is_in]]] = wanted[is_in]
        left -= np.bincount(wanted[is_in], minlength=num_codes)
        waiting = np.sort(waiting[order[~is_in]])
    return codes


def _nearest(points: np.ndarray, centres: np.ndarray, is_open: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest open code of each point, and its squared distance."""
    codes, distances = np.empty(len(points), dtype=np.int64), np.empty(len(points))
    squares = (centres**2).sum(1)
    for start in range(0, len(points), _CHUNK_ITEMS):
        chunk = points[start : start + _CHUNK_ITEMS]
        found = np.full((len(chunk), len(is_open)), _FAR)
        found[:, : len(centres)] = (chunk**2).sum(1, keepdims=True) - 2 * chunk @ centres.T + squares
        found[:, ~is_open] = np.inf
        nearest = found.argmin(1)
        codes[start : start + len(chunk)], distances[start : start + len(chunk)] = nearest, found[np.arange(len(chunk)), nearest]
    return codes, distances
