"""Shared memory for decoded rows: regions never overlap, arrays come out as they went in."""

from __future__ import annotations

import mmap

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.geometry import PictureView
from megamm.core.types import AudioInput, ImageInput, TokenSequence
from megamm.data.loading.arena import Arena, RegionWriter, map_arrays


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=60))
def test_regions_never_overlap_and_freed_room_is_used_again(steps):
    arena, taken = Arena(8192), []
    for is_release, number in steps:
        if is_release and taken:
            arena.release(taken.pop(number % len(taken)))
            continue
        region = arena.reserve(number)
        if region is None:
            gaps = [0, *sorted(one.start + one.size for one in taken)], [*sorted(one.start for one in taken), 8192]
            assert max(end - start for start, end in zip(*gaps, strict=True)) < number
            continue
        assert region.size >= number and region.start >= 0 and region.start + region.size <= 8192
        assert all(region.start + region.size <= one.start or one.start + one.size <= region.start for one in taken)
        taken.append(region)
    for region in taken:
        arena.release(region)
    assert arena.reserve(8192) is not None
    arena.close()
    arena.close()


def sequence():
    random = np.random.default_rng(0)
    ids = np.arange(9, dtype=np.int32)
    image = ImageInput(random.random((4, 12), dtype=np.float32), (2, 2), 4, PictureView.whole(8, 8))
    audio = AudioInput(random.random((8, 30), dtype=np.float32), 4)
    return TokenSequence("digits", "k", "text", ids, ids + 1, np.ones(9, np.float32), [image], [audio])


def test_sequences_come_out_as_they_went_in_and_what_finds_no_room_travels_itself():
    for num_bytes in (1 << 16, 200, 0):
        arena = Arena(1 << 16)
        region = arena.reserve(num_bytes)
        stored = map_arrays(sequence(), RegionWriter(mmap.mmap(arena.descriptor, 0), region))
        travelling = [array for array in (stored.input_ids, stored.images[0].pixels, stored.audios[0].mel) if isinstance(array, np.ndarray)]
        assert len(travelling) == {1 << 16: 0, 200: 2, 0: 3}[num_bytes]
        found, expected = map_arrays(stored, arena.view), sequence()
        for one, other in ((found.input_ids, expected.input_ids), (found.labels, expected.labels), (found.weights, expected.weights)):
            assert one.dtype == other.dtype and one.tolist() == other.tolist()
        assert np.array_equal(found.images[0].pixels, expected.images[0].pixels) and found.images[0].grid == (2, 2)
        assert np.array_equal(found.audios[0].mel, expected.audios[0].mel) and found.audios[0].num_tokens == 4
        arena.close()


def test_arrays_outlive_the_close_of_their_arena():
    arena = Arena(4096)
    place = RegionWriter(mmap.mmap(arena.descriptor, 0), arena.reserve(400))(np.arange(100, dtype=np.int32))
    view = arena.view(place)
    arena.close()
    del arena
    assert view.tolist() == list(range(100))
