import math
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from megamm.core.errors import DataError
from megamm.core.predictions import Instance
from megamm.metrics.masks import class_overlaps, constant_foreground, foreground, instance_scores, match_instances, mean_class_iou


def instance(pixels, label="nucleus", score=1.0) -> Instance:
    """Run lengths of a mask, down the columns."""
    array = np.asarray(pixels, dtype=bool)
    runs = [(value, len(list(run))) for value, run in groupby(array.flatten(order="F").tolist())]
    first = (0,) if runs and runs[0][0] else ()
    return Instance(label, array.shape, (*first, *(length for _, length in runs)), score)


TOP = instance([[1, 1, 1], [0, 0, 0]])
BOTTOM = instance([[0, 0, 0], [1, 1, 1]])
LEFT = instance([[1, 0, 0], [1, 0, 0]])
ALL = instance([[1, 1, 1], [1, 1, 1]])


def test_foreground_of_a_counted_example():
    # One of four pixels in common; all right; missed; invented; rightly nothing.
    overlap = foreground([[LEFT], [TOP, BOTTOM], [], [LEFT], []], [[TOP], [ALL], [TOP], [], []])
    assert overlap.intersections.tolist() == [1, 6, 0, 0, 0]
    assert overlap.unions.tolist() == [4, 6, 3, 2, 0]
    assert overlap.ious.tolist() == [0.25, 1, 0, 0, 1]
    assert overlap.mean_iou == pytest.approx(2.25 / 5)
    assert overlap.pooled_iou == pytest.approx(7 / 15)


def test_pictures_without_any_foreground_have_no_pooled_iou():
    assert math.isnan(foreground([[]], [[]]).pooled_iou)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_foreground_equals_counted_pixels(data):
    pixels = numpy_strategies.arrays(bool, (3, 5))
    given_masks = data.draw(st.lists(pixels, max_size=3))
    wanted_masks = data.draw(st.lists(pixels, max_size=3))
    overlap = foreground([[instance(mask) for mask in given_masks]], [[instance(mask) for mask in wanted_masks]])
    any_given = np.any([np.zeros((3, 5), bool), *given_masks], axis=0)
    any_wanted = np.any([np.zeros((3, 5), bool), *wanted_masks], axis=0)
    assert overlap.intersections[0] == np.count_nonzero(any_given & any_wanted)
    assert overlap.unions[0] == np.count_nonzero(any_given | any_wanted)


def test_mean_class_iou_of_a_counted_example():
    sky, sea = instance([[1, 1, 1], [0, 0, 0]], "sky"), instance([[0, 0, 0], [1, 1, 1]], "sea")
    fog = instance([[0, 0, 0], [1, 0, 0]], "fog")
    overlaps = class_overlaps([[instance([[1, 1, 0], [1, 0, 0]], "sky"), fog], [sky]], [[sky, sea], [sky]])
    assert {label: one.pooled_iou for label, one in overlaps.items()} == pytest.approx({"sea": 0, "sky": (2 + 3) / (4 + 3)})
    mean = mean_class_iou(overlaps)
    assert mean(np.array([0, 1])) == pytest.approx(5 / 7 / 2)
    assert mean(np.array([1, 1])) == 1, "no sea in the second picture"
    assert math.isnan(mean_class_iou(class_overlaps([[sky]], [[]]))(np.array([0])))


def test_instances_are_found_by_their_overlap():
    # IoU 2/3 with TOP: right at 0.5, 0.55, 0.6 and 0.65.
    part = instance([[1, 1, 0], [0, 0, 0]], score=0.9)
    scores = instance_scores([[part]], [[TOP]])
    assert (scores.map50, scores.map) == pytest.approx((1, 0.4))


def test_instances_of_pictures_without_any_and_all_wrong():
    assert instance_scores([[TOP], []], [[TOP], []]).map == pytest.approx(1)
    assert instance_scores([[BOTTOM], [LEFT]], [[TOP], []]).map50 == 0


def test_more_instances_than_cocos_bound_count_where_asked():
    grid = np.eye(200, dtype=bool).reshape(200, 10, 20)
    instances = [instance(pixels) for pixels in grid]
    assert match_instances([instances], [instances]).scores().recall == 0.5
    assert match_instances([instances], [instances], max_predictions=200).scores().recall == 1


def test_calling_everything_foreground_is_the_constant_answer():
    overlap = constant_foreground([[TOP], []], [(2, 3), (4, 4)])
    assert overlap.ious.tolist() == [0.5, 0]
    assert overlap.pooled_iou == pytest.approx(3 / 22)


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ([[Instance("a", (3, 2), (6,))]], [[TOP]], r"masks of picture 0 have sizes \[\(2, 3\), \(3, 2\)\]"),
        ([[Instance("a", (2, 3), (2, 3))]], [[TOP]], "run lengths of mask 'a' of picture 0 sum to 5, not to 2 × 3"),
        ([[Instance("a", (2, 3), (7, -1))]], [[TOP]], "negative"),
        ([[]], [[Instance("a", (2, 3), (6,))]], "reference 'a' of picture 0 has no pixels"),
        ([[]], [[]], "none of 1 pictures has a reference"),
    ],
)
def test_masks_that_cannot_be_judged_are_named(predictions, references, words):
    with pytest.raises(DataError, match=words):
        instance_scores(predictions, references)
