"""Keyed permutations and keys: randomness that is a function of a seed and a position, so that nothing is stored.

A Feistel network over a x b >= size numbers is a bijection whatever its round function does; numbers outside the range are
sent through it again ("cycle walking"), which keeps it a bijection of the range.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), section 5.
"""

from __future__ import annotations

import math
from typing import TypeAlias, overload

import numpy as np

Number: TypeAlias = "np.ndarray | np.uint64"
Key: TypeAlias = "np.ndarray | int"

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)
_ROUND_KEYS = tuple(np.uint64((round_ + 1) * _GOLDEN & _MASK) for round_ in range(6))


@overload
def derive_key(key: int, number: int) -> int: ...
@overload
def derive_key(key: Key, number: Key) -> Key: ...
def derive_key(key: Key, number: Key) -> Key:
    """A 64-bit key that depends on `key` and `number` (the finaliser of splitmix64); uint64[n] where one of them is."""
    mixed = key & _MASK ^ (number + 1) * _GOLDEN & _MASK
    mixed = (mixed ^ mixed >> 30) * int(_MIX_1) & _MASK
    mixed = (mixed ^ mixed >> 27) * int(_MIX_2) & _MASK
    return mixed ^ mixed >> 31


def permute(position: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Map positions to where a keyed permutation of [0, size) sends them.

    Args:
        position: int64[n], each below its size.
        size: Size of the permuted range, at most 2**62; one for all or int64[n].
        key: 64-bit key; one for all or uint64[n].

    Returns:
        int64[n].
    """
    rows, columns, limit = _grid(size)
    round_key = np.uint64(key) if isinstance(key, int) else key
    result = _feistel(position.astype(np.uint64), rows, columns, round_key)
    while (outside := np.flatnonzero(result >= limit)).size:
        parts = (value[outside] if isinstance(value, np.ndarray) else value for value in (rows, columns, round_key))
        result[outside] = _feistel(result[outside], *parts)
    return result.astype(np.int64)


def _grid(size: np.ndarray | int) -> tuple[Number, Number, Number]:
    """A grid of rows x columns that covers `size` numbers with few to spare, and `size` itself."""
    if isinstance(size, int):
        rows = math.isqrt(size) + 1
        return np.uint64(rows), np.uint64(-(-size // rows)), np.uint64(size)
    limit = size.astype(np.uint64)
    rows = np.sqrt(limit.astype(np.float64)).astype(np.uint64) + np.uint64(1)
    return rows, (limit + rows - np.uint64(1)) // rows, limit


def _feistel(number: np.ndarray, rows: Number, columns: Number, key: Number) -> np.ndarray:
    left = number // columns
    right = number - left * columns
    for round_key in range(0, len(_ROUND_KEYS), 2):
        left = _shifted(left, right, rows, key ^ _ROUND_KEYS[round_key])
        right = _shifted(right, left, columns, key ^ _ROUND_KEYS[round_key + 1])
    return left * columns + right


def _shifted(half: np.ndarray, other: np.ndarray, modulus: Number, key: Number) -> np.ndarray:
    """`half` moved by a hash of `other`, modulo `modulus` (which is below 2**32)."""
    hashed = (other ^ key) * _MIX_1
    hashed = (hashed ^ hashed >> _HALF) * _MIX_2
    moved = half + ((hashed >> _HALF) * modulus >> _HALF)
    return moved - modulus * (moved >= modulus)
