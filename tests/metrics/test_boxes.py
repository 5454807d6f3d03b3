import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.core.errors import DataError
from megamm.core.predictions import Box
from megamm.metrics.bootstrap import interval
from megamm.metrics.boxes import box_scores, match_boxes

FIRST = Box("cell", (0, 0, 10, 10))
SECOND = Box("cell", (20, 20, 30, 30))
ELSEWHERE = Box("cell", (50, 50, 60, 60), 0.8)
# IoU with SECOND: 62 of 100 pixels.
PART_OF_SECOND = Box("cell", (20, 20, 30, 26.2), 0.7)


def test_precision_of_a_hand_computed_example():
    scores = box_scores([[ELSEWHERE, PART_OF_SECOND, Box("cell", (0, 0, 10, 10), 0.9)]], [[FIRST, SECOND]])
    # In order of scores: right, wrong, right at IoU 0.5, 0.55 and 0.6; right, wrong, wrong at the seven stricter ones.
    at_half = (51 * 1 + 50 * 2 / 3) / 101
    assert scores.map50 == pytest.approx(at_half)
    assert scores.map == pytest.approx((3 * at_half + 7 * 51 / 101) / 10)
    assert scores.recall == pytest.approx((3 * 1 + 7 * 0.5) / 10)
    (row,) = scores.classes
    assert (row.label, row.num_references, row.num_predictions) == ("cell", 2, 3)
    assert row.recall50 == 1
    assert row.precisions == pytest.approx([1] * 51 + [2 / 3] * 50)


def test_classes_count_alike_and_a_class_never_found_is_zero():
    scores = box_scores([[FIRST], [FIRST]], [[FIRST], [FIRST, Box("platelet", (1, 1, 3, 3))]])
    assert [(row.label, row.ap50, row.num_predictions) for row in scores.classes] == [("cell", 1.0, 2), ("platelet", 0.0, 0)]
    assert scores.map50 == scores.map == scores.recall == 0.5


def test_pictures_without_boxes_count_by_what_is_predicted_in_them():
    assert box_scores([[FIRST], []], [[FIRST], []]).map50 == pytest.approx(1)
    # The wrong box has the highest score, so that precision never exceeds one half.
    assert box_scores([[Box("cell", FIRST.xyxy, 0.5)], [ELSEWHERE]], [[FIRST], []]).map50 == pytest.approx(0.5)


def test_all_wrong_and_nothing_said_are_zero():
    assert box_scores([[ELSEWHERE]], [[FIRST]]).map50 == 0
    assert box_scores([[]], [[FIRST]]).map50 == 0


def test_a_second_box_for_the_same_reference_is_wrong():
    assert box_scores([[FIRST, Box("cell", (0, 0, 10, 9), 0.9)]], [[FIRST, SECOND]]).classes[0].recall50 == 0.5


def test_labels_without_a_reference_are_counted_not_hidden():
    matches = match_boxes([[FIRST, Box("细胞", (0, 0, 1, 1)), Box("细胞", (1, 1, 2, 2))]], [[FIRST]])
    assert matches.num_unknown == {"细胞": 2}
    assert matches.scores().map50 == pytest.approx(1)


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    crowd = Box("cell", (40, 40, 80, 80), is_crowd=True)
    predictions = [[ELSEWHERE, Box("cell", FIRST.xyxy, 0.5)]]
    assert match_boxes(predictions, [[FIRST, crowd]]).scores().map50 == pytest.approx(1)
    assert box_scores(predictions, [[FIRST]]).map50 == pytest.approx(0.5)


def test_boxes_of_every_size_count():
    huge = Box("cell", (0, 0, 200_000, 200_000))
    assert box_scores([[huge]], [[huge]]).map50 == pytest.approx(1)


def test_only_the_best_predictions_of_a_picture_count():
    predictions = [[ELSEWHERE, Box("cell", FIRST.xyxy, 0.5)]]
    assert match_boxes(predictions, [[FIRST]], max_predictions=1).scores().recall == 0


def test_equal_scores_count_in_the_order_of_pictures_and_then_of_corners():
    right, wrong = Box("cell", FIRST.xyxy, 0.8), ELSEWHERE
    # The right one lies further left, so that it comes first however they are given.
    for predictions in ([right, wrong], [wrong, right]):
        assert box_scores([predictions], [[FIRST]]).map50 == pytest.approx(1)
    assert box_scores([[right], [wrong]], [[FIRST], []]).map50 == pytest.approx(1)
    assert box_scores([[wrong], [right]], [[], [FIRST]]).map50 == pytest.approx(0.5)


def test_nothing_is_printed(capsys):
    box_scores([[FIRST]], [[FIRST]])
    assert capsys.readouterr() == ("", "")


CORNER = st.integers(0, 12)
BOXES = st.lists(
    st.builds(
        lambda label, x, y, width, height, score: Box(label, (x, y, x + width, y + height), score),
        st.sampled_from("ab"),
        CORNER,
        CORNER,
        st.integers(1, 8),
        st.integers(1, 8),
        st.sampled_from([0.5, 0.9, 1.0]),
    ),
    max_size=4,
)
PICTURES = st.lists(st.tuples(BOXES, BOXES), min_size=1, max_size=4).filter(lambda pairs: any(wanted for _, wanted in pairs))


@settings(max_examples=25, deadline=None)
@given(PICTURES)
def test_references_answered_are_perfect(pairs):
    references = [wanted for _, wanted in pairs]
    scores = box_scores(references, references)
    assert (scores.map50, scores.map, scores.recall) == pytest.approx((1, 1, 1))


@settings(max_examples=25, deadline=None)
@given(PICTURES, st.data())
def test_chosen_pictures_score_as_they_would_alone(pairs, data):
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=len(pairs)))
    predictions, references = zip(*pairs, strict=True)
    scores = match_boxes(predictions, references).scores(np.array(chosen))
    if any(references[index] for index in chosen):
        assert scores == box_scores([predictions[index] for index in chosen], [references[index] for index in chosen])
    else:
        assert math.isnan(scores.map50) and scores.classes == ()


def test_an_interval_of_precision_holds_it():
    generator = np.random.default_rng(3)
    references = [[Box("a", (0, 0, 10, 10)), Box("b", (20, 0, 30, 10))] for _ in range(20)]
    predictions = [[Box(box.label, box.xyxy, generator.random()) for box in boxes if generator.random() < 0.7] for boxes in references]
    matches = match_boxes(predictions, references)
    found = interval(lambda indices: matches.scores(indices).map50, matches.num_pictures, num_resamples=50)
    assert 0 < found.low < matches.scores().map50 < found.high < 1


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ([[]], [[]], "none of 1 pictures has a reference"),
        ([], [], "0 predictions for 0 references"),
        ([[Box("a", (5, 0, 4, 1))]], [[FIRST]], r"prediction 'a' of picture 0 has xyxy=\[5, 0, 4, 1\]"),
        ([[Box("a", (0, 0, math.nan, 1))]], [[FIRST]], "prediction 'a' of picture 0 has xyxy=.*nan"),
        ([[Box("a", (0, 0, math.inf, 1))]], [[FIRST]], "finite corners"),
        ([[Box("cell", (0, 0, 1, 1), math.nan)]], [[FIRST]], "prediction 'cell' of picture 0 has score=nan"),
        ([[], []], [[FIRST], [Box("b", (1, 1, 1, 4))]], "reference 'b' of picture 1"),
    ],
)
def test_boxes_that_cannot_be_judged_are_named(predictions, references, words):
    with pytest.raises(DataError, match=words):
        box_scores(predictions, references)


def test_a_prediction_without_area_finds_nothing():
    assert box_scores([[Box("cell", (3, 3, 3, 8))]], [[FIRST]]).map50 == 0
