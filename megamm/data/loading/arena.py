"""Shared memory for decoded rows: written by decoder processes, read in place by the loader.

The memory has no name. It lives as long as a process holds its descriptor or its map, so nothing can be left in /dev/shm however a
process ends. Pages are taken when they are first written, and used again from the lowest address on.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megamm.core.errors import ConfigError
from megamm.core.types import AudioInput, HeadTarget, HiddenCells, ImageInput, TokenSequence
from megamm.data.media.features import MediaRules
from megamm.data.planning.rows import PlannedSample

_ALIGNMENT_BYTES = 64
_VALUE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes `start` to `start + size` of an arena."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """Where an array lies in an arena."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampleBytes:
    """Bytes of a decoded sample's arrays: for a token, a patch, a mel frame."""

    token: int
    patch: int
    frame: int

    @classmethod
    def of(cls, rules: MediaRules) -> SampleBytes:
        """The sizes under the rules of a run."""
        patch = 0
        # What a masked head is to fill in travels beside what hides it.
        copies = 2 if rules.head is not None and rules.head.kind == "masked" else 1
        if rules.image is not None:
            side = rules.image.patch_size if rules.image.kind == "naflex" else rules.image.stride * rules.image.merge
            patch = copies * _VALUE_BYTES * 3 * side**2
        return cls(3 * _VALUE_BYTES, patch, copies * _VALUE_BYTES * rules.audio.num_mel if rules.audio is not None else 0)

    def row(self, samples: Sequence[PlannedSample]) -> int:
        """Of a planned row."""
        return sum(one.tokens * self.token + one.patches * self.patch + one.frames * self.frame for one in samples)


class Arena:
    """Anonymous shared memory that is handed out in regions, first fit. Not thread-safe: its owner holds a lock.

    State: the regions that are taken. Views of arrays stay valid until their region is released.

    Attributes:
        descriptor: To be handed to other processes.
        num_bytes: All of it.
    """

    def __init__(self, num_bytes: int) -> None:
        """Make the memory.

        Raises:
            ConfigError: This system has no anonymous shared memory.
        """
        if not hasattr(os, "memfd_create"):
            raise ConfigError('data.decoders="processes" needs Linux; set it to "threads"')
        self.num_bytes = max(num_bytes, mmap.PAGESIZE)
        self.descriptor = os.memfd_create("megamm-decoders", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.num_bytes)
        self._map = mmap.mmap(self.descriptor, self.num_bytes)
        self._taken: list[Region] = []

    def room_for(self, num_bytes: int, num_arrays: int) -> int:
        """Bytes to reserve for so many arrays; 0 where they can never find room here and must travel with their message."""
        size = num_bytes + num_arrays * _ALIGNMENT_BYTES
        return size if size <= self.num_bytes else 0

    def reserve(self, num_bytes: int) -> Region | None:
        """The lowest free region of that size; None where there is no room for it now."""
        size = -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        start = place = 0
        while place < len(self._taken) and self._taken[place].start - start < size:
            start = self._taken[place].start + self._taken[place].size
            place += 1
        if self.num_bytes - start < size:
            return None
        region = Region(start, size)
        self._taken.insert(place, region)
        return region

    def release(self, region: Region) -> None:
        """Give a region back; views of it must not be used any more."""
        self._taken.remove(region)

    def view(self, place: ArrayPlace | np.ndarray) -> np.ndarray:
        """The array at a place, without a copy; an array that found no room came with its message and is itself."""
        if isinstance(place, np.ndarray):
            return place
        return np.ndarray(place.shape, np.dtype(place.dtype), self._map, place.offset)

    def close(self) -> None:
        """Give the memory back as soon as the last view of it is gone; may be called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class RegionWriter:
    """Lays arrays one behind the other into a region. State: where the next one goes."""

    def __init__(self, memory: mmap.mmap, region: Region) -> None:
        self._memory, self._next, self._end = memory, region.start, region.start + region.size

    def __call__(self, array: np.ndarray) -> ArrayPlace | np.ndarray:
        """Copy an array in; where there is no room for it, it is returned as it is, to travel with the message."""
        if self._next + array.nbytes > self._end:
            return array
        place = ArrayPlace(self._next, array.dtype.str, array.shape)
        np.ndarray(array.shape, array.dtype, self._memory, self._next)[...] = array
        self._next += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return place


def map_arrays(sequence: TokenSequence, change: Callable) -> TokenSequence:
    """The sequence with `change` applied to each of its arrays: how it goes into an arena and comes out of it."""
    return TokenSequence(
        sequence.dataset,
        sequence.key,
        sequence.task,
        input_ids=change(sequence.input_ids),
        labels=change(sequence.labels),
        weights=change(sequence.weights),
        images=[ImageInput(change(image.pixels), image.grid, image.num_tokens, image.view) for image in sequence.images],
        audios=[AudioInput(change(audio.mel), audio.num_tokens) for audio in sequence.audios],
        target=None if sequence.target is None else _map_target(sequence.target, change),
    )


def _map_target(target: HeadTarget, change: Callable) -> HeadTarget:
    boxes, pixels = (None if one is None else change(one) for one in (target.boxes, target.pixels))
    pictures, sounds = (None if one is None else _map_cells(one, change) for one in (target.pictures, target.sounds))
    return HeadTarget(change(target.ids), change(target.counts), boxes, pixels, pictures, sounds)


def _map_cells(hidden: HiddenCells, change: Callable) -> HiddenCells:
    return HiddenCells(change(hidden.numbers), change(hidden.values), change(hidden.documents))
