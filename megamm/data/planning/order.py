"""The order of samples: a keyed permutation evaluated at a position, so that seeking costs nothing and nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamm.data.keyed import Key, derive_key, permute

_NUM_POSITIONS = 1 << 62
# Sets the draws of variants apart from what else is derived from the seed.
_VARIANTS = 0x5EED
_WINDOW_KEYS = np.uint64(0x94D049BB133111EB)


def sample_at(position: np.ndarray, *, num_samples: int, block: int, window: int, seed: int, epoch: Key) -> np.ndarray:
    """Which samples stand at some positions of an epoch.

    Blocks of `block` neighbouring samples are permuted; then the samples of every `window` consecutive blocks are permuted
    among themselves. Reading follows blocks, so one setting trades the quality of the shuffle against sequential reads.
    Every epoch is another permutation of all samples, whether or not `block` divides them.

    Args:
        position: int64[n], each below `num_samples`.
        num_samples: Samples of the dataset.
        block: Neighbouring samples that stay together; 1 permutes single samples, which no window could mix further.
        window: Blocks that are mixed with each other.
        seed: 64-bit key of the dataset's order.
        epoch: Pass over the dataset; one for all or uint64[n].

    Returns:
        int64[n], the samples.
    """
    key = derive_key(seed, epoch)
    if block == 1:
        return permute(position, num_samples, derive_key(key, 0))
    short_slot = derive_key(key, 1) % (num_samples // block + 1)
    blocks = _Blocks(num_samples, block, short_slot if isinstance(short_slot, int) else short_slot.astype(np.int64))
    number = blocks.slot_of(position)[0] // window
    start, end = blocks.start_of(number * window), blocks.start_of((number + 1) * window)
    window_key = (number.astype(np.uint64) + np.uint64(1)) * _WINDOW_KEYS ^ np.uint64(derive_key(key, 2))
    slot, offset = blocks.slot_of(start + permute(position - start, end - start, window_key))
    return blocks.block_at(slot, derive_key(key, 3)) * block + offset


def variants_at(seed: int, positions: np.ndarray, num_variants: int) -> np.ndarray:
    """Which variant of its planned lengths the sample at each position takes: drawn evenly, by seed and position alone.

    Args:
        seed: Of the run.
        positions: int64[n].
        num_variants: Of the dataset.

    Returns:
        int64[n], each below `num_variants`.
    """
    if num_variants == 1:
        return np.zeros_like(positions)
    return permute(positions, _NUM_POSITIONS, derive_key(seed, _VARIANTS)) % num_variants


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Slots of an epoch, each filled by one block of samples.

    The slot of the last block, which may be short, is drawn apart from the permutation of the others, so that no inverse
    permutation is needed to know where the slots after it begin. It is int64[n] where positions are of many epochs.
    """

    num_samples: int
    block: int
    short_slot: Key

    def slot_of(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slot and offset inside its block of a position."""
        num_short = self.num_samples % self.block
        if not num_short:
            return np.divmod(position, self.block)
        return np.divmod(position + (self.block - num_short) * (position >= self.short_slot * self.block + num_short), self.block)

    def start_of(self, slot: np.ndarray) -> np.ndarray:
        """Position where a slot begins; the end of the epoch for slots beyond it."""
        missing = -self.num_samples % self.block
        return np.minimum(slot * self.block - missing * (slot > self.short_slot), self.num_samples)

    def block_at(self, slot: np.ndarray, key: Key) -> np.ndarray:
        """The block that fills a slot."""
        num_full, num_short = divmod(self.num_samples, self.block)
        if not num_short:
            return permute(slot, num_full, key)
        is_short = slot == self.short_slot
        full = permute(np.where(is_short, 0, slot - (slot > self.short_slot)), max(num_full, 1), key)
        return np.where(is_short, num_full, full)
