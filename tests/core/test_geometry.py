import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.geometry import Affine, PictureView, seen_box, seen_outline

numbers = st.floats(-10, 10)
affines = st.builds(Affine, numbers, numbers, numbers, numbers, numbers, numbers).filter(
    lambda one: abs(one.a * one.e - one.b * one.d) > 0.1
)


@given(affines, affines, st.tuples(numbers, numbers))
def test_maps_are_joined_and_undone(first, second, point):
    assert first.then(second)(point) == pytest.approx(second(first(point)), abs=1e-6)
    assert first.inverse()(first(point)) == pytest.approx(point, abs=1e-6)


def test_a_whole_view_is_shares_of_the_sides():
    view = PictureView.whole(200, 100)
    assert seen_box("a", (50, 25, 200, 100), view).points == ((0.25, 0.25), (1.0, 1.0))
    assert view.source((0.25, 0.5)) == pytest.approx((50, 50))
    assert view.source((1.5, -1)) == pytest.approx((200, 0))


def test_a_box_is_cut_off_at_the_border_and_unseen_where_little_is_left():
    # The view is the right half of the picture, mirrored.
    view = PictureView(100, 100, Affine.shift(-50, 0).then(Affine(a=-1, c=50)).then(Affine.scale(1 / 50, 1 / 100)))
    half = seen_box("half", (40, 0, 60, 100), view)
    assert half.is_visible and half.points == ((pytest.approx(0.8), 0.0), (1.0, 1.0))
    assert not seen_box("sliver", (0, 0, 55, 100), view).is_visible
    assert not seen_box("outside", (0, 0, 50, 100), view).is_visible


def test_a_turned_box_is_the_box_around_its_corners():
    view = PictureView(100, 100, Affine(0, -1, 100, 1, 0, 0).then(Affine.scale(0.01, 0.01)))
    assert seen_box("a", (10, 20, 30, 80), view).bounds == pytest.approx((0.2, 0.1, 0.8, 0.3))


def test_an_outline_is_seen_where_its_middle_is():
    view = PictureView(100, 100, Affine.shift(-50, 0).then(Affine.scale(1 / 50, 1 / 100)))
    seen = seen_outline("a", [(40, 0), (80, 0), (80, 50), (40, 50)], view)
    assert seen.is_visible and seen.bounds == pytest.approx((0.0, 0.0, 0.6, 0.5))
    assert not seen_outline("a", [(0, 0), (60, 0), (60, 50), (0, 50)], view).is_visible
