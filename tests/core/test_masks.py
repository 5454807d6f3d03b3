import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.core.masks import fill, outline, pixels_of, run_lengths

masks = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.5, 0.9])).map(
    lambda drawn: np.random.default_rng(drawn[2]).random(drawn[:2]) < drawn[3]
)


def test_an_outline_begins_at_the_top_and_goes_clockwise():
    pixels = np.zeros((6, 7), dtype=bool)
    pixels[1:4, 2:5] = True
    assert outline(pixels, 4) == ((2, 1), (5, 1), (5, 4), (2, 4))
    assert outline(pixels, 12)[1] == (3, 1)
    assert outline(np.ones((1, 1), dtype=bool), 4) == ((0, 0), (1, 0), (1, 1), (0, 1))


def test_of_several_pieces_the_largest_counts_and_holes_are_filled():
    pixels = np.zeros((20, 20), dtype=bool)
    pixels[0, 0] = True
    pixels[5:15, 5:15] = True
    pixels[8:10, 8:10] = False
    found = fill(outline(pixels, 40), 20, 20)
    assert found[5:15, 5:15].all() and found.sum() == 100
    pixels[2:4, 3:6] = True
    assert np.array_equal(fill(outline(pixels, 40), 20, 20), found)


def test_nothing_has_no_outline():
    with pytest.raises(ValueError, match="no pixel is set"):
        outline(np.zeros((3, 3), dtype=bool), 8)
    with pytest.raises(ValueError, match="takes 3 or more"):
        outline(np.ones((3, 3), dtype=bool), 2)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 20), st.integers(0, 20))
def test_a_rectangle_with_a_point_at_every_corner_comes_back(height, width, top, left):
    pixels = np.zeros((40, 40), dtype=bool)
    pixels[top : top + height, left : left + width] = True
    assert np.array_equal(fill(outline(pixels, 2 * (height + width)), 40, 40), pixels)


def test_round_things_keep_their_shape():
    """Twelve corners keep nine tenths of a disc, sixteen more."""
    rows, columns = np.mgrid[:64, :64] + 0.5
    disc = np.hypot(rows - 32, columns - 32) < 20
    for num_points, least in ((8, 0.85), (12, 0.92), (32, 0.98)):
        found = fill(outline(disc, num_points), 64, 64)
        assert (found & disc).sum() / (found | disc).sum() > least


@settings(max_examples=200)
@given(masks)
def test_run_lengths_are_what_pycocotools_reads(pixels):
    counts = run_lengths(pixels)
    assert sum(counts) == pixels.size
    assert np.array_equal(pixels_of(counts, pixels.shape), pixels)
    coco = pytest.importorskip("pycocotools.mask")
    packed = coco.frPyObjects({"size": list(pixels.shape), "counts": list(counts)}, *pixels.shape)
    assert np.array_equal(coco.decode(packed).astype(bool), pixels)


def test_runs_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="runs of 5 pixels for a mask of 2 x 3"):
        pixels_of([2, 3], (2, 3))


@settings(max_examples=200)
@given(masks)
def test_every_set_of_pixels_has_an_outline_around_its_largest_piece(pixels):
    if not pixels.any():
        return
    found = fill(outline(pixels, 400), pixels.shape[1], pixels.shape[0])
    assert (found & pixels).any()
