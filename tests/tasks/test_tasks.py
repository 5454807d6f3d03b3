import re
from pathlib import Path

import numpy as np
import pytest

from megamm.core.errors import DataError
from megamm.core.masks import run_lengths
from megamm.core.predictions import Box, Instance, RankedItem
from megamm.core.types import Message, Part
from megamm.tasks import TASKS, detection
from megamm.tasks.reply import Reply


def figures(name, answers, references):
    """Metric -> (its value over all samples, chance), of answers given as texts or replies."""
    task = TASKS[name]

    def parsed(replies):
        return [task.parse(Reply(one) if isinstance(one, str) else one) for one in replies]

    judged = task.figures(parsed(answers), parsed(references))
    return {figure.name: (figure.statistic(np.arange(len(references))), figure.chance) for figure in judged}


def test_the_table_is_keyed_by_name():
    assert all(task.name == name and task.prompt for name, task in TASKS.items())
    classes = {"classification", "audio_classification", "matching", "sentiment"}
    assert {name for name, task in TASKS.items() if task.label is not None} == classes


def test_the_documentation_lists_every_task_as_it_is():
    lines = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8").splitlines()
    told = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:4]] for line in lines if re.match(r"\| `\w+` \| \w", line)}
    told = {name: (prompt, kinds.partition(",")[0]) for name, (prompt, kinds) in told.items() if name in TASKS}
    assert told == {name: (task.prompt, " or ".join(task.kinds)) for name, task in TASKS.items()}


@pytest.mark.parametrize("name", ["classification", "audio_classification", "matching"])
def test_labels(name):
    found = figures(name, [" 7", "7\n", "3", "1"], ["7", "7", "7", "1"])
    assert found == {
        "accuracy": (0.75, 0.75),
        "macro_recall": (pytest.approx((2 / 3 + 1) / 2), 0.5),
        "macro_f1": (pytest.approx((0.8 + 1) / 2), pytest.approx(2 * 0.75 / 1.75 / 2)),
    }


def test_several_labels_have_no_order():
    found = figures("sentiment", ["joy, love", "anger", ""], ["love,joy", "anger, fear", "fear"])
    assert found["accuracy"][0] == pytest.approx(1 / 3)
    # anger 1, fear 0, joy 1, love 1.
    assert found["macro_f1"][0] == pytest.approx(3 / 4)
    assert found["micro_f1"][0] == pytest.approx(2 * 3 / (2 * 3 + 2))


def test_speech_recognition():
    found = figures("speech_recognition", ["Seven ", "one  two"], ["seven", "one"])
    assert found["accuracy"] == (0.5, 0.5)
    # One word too many for two words.
    assert found["word_error_rate"] == (0.5, None)


def test_counts_are_numbers_and_other_answers_are_not():
    counted = figures("question_answering", ["3", "4", "many"], ["3", "5", "2"])
    assert counted["exact_match"][0] == pytest.approx(1 / 3)
    assert counted["mean_absolute_error"] == (pytest.approx((0 + 1 + 2) / 3), pytest.approx((0 + 2 + 1) / 3))
    assert set(figures("question_answering", ["3", "red"], ["3", "red"])) == {"exact_match"}


@pytest.mark.parametrize(("name", "first"), [("captioning", "cider"), ("translation", "chrf")])
def test_free_text(name, first):
    references = ["a red house stands there", "two green trees grow", "一只猫坐在树上"]
    right, wrong = figures(name, references, references), figures(name, ["x", "y", "z"], references)
    assert next(iter(right)) == first
    assert right["exact_match"][0] == 1 and wrong["exact_match"][0] == 0
    assert all(right[metric][0] > wrong[metric][0] for metric in right)
    # One sample does not tell which words are rare, and has the other figures all the same.
    assert figures(name, references[:1], references[:1])["exact_match"][0] == 1


def test_detection_is_judged_by_average_precision():
    cell, other = Box("RBC", (10, 10, 50, 50)), Box("WBC", (60, 60, 90, 90))
    references = [Reply(boxes=(cell, other)), Reply()]
    assert figures("detection", references, references)["map50"] == (pytest.approx(1), None)
    half = figures("detection", [Reply(boxes=(Box("RBC", (11, 10, 50, 50), 0.9),)), Reply()], references)
    assert half["map50"][0] == pytest.approx(0.5)


def test_crowds_beside_a_sample_are_boxes_and_anything_else_of_that_name_is_none():
    crowd = {"label": "cell", "xyxy": [0, 0, 50, 50]}
    assert detection.crowds_of({"crowd": [crowd]}) == (Box("cell", (0, 0, 50, 50), is_crowd=True),)
    for other in ({}, {"crowd": 5}, {"crowd": "many"}, {"crowd": [{"label": "cell"}]}, {"crowd": []}):
        assert detection.crowds_of(other) == ()
    assert Box.from_json(Box("a", (0, 0, 1, 1), is_crowd=True).to_json()).is_crowd


def test_a_question_shows_what_its_task_is_about():
    shown = {kind: [Message("user", (Part(kind, member="0.x"), Part("text", text="?")))] for kind in ("image", "audio", "text")}
    fits = {"detection": {"image"}, "speech_recognition": {"audio"}, "captioning": {"image", "audio"}, "sentiment": set(shown)}
    for name, kinds in fits.items():
        for kind, messages in shown.items():
            if kind in kinds:
                TASKS[name].check_question(messages)
            else:
                with pytest.raises(DataError, match=f"the question shows no .*, which {name} is about"):
                    TASKS[name].check_question(messages)


def test_segmentation_is_judged_by_pixels_and_by_instances():
    pixels = np.zeros((8, 8), dtype=bool)
    pixels[2:6, 2:6] = True
    nucleus = Instance("nucleus", (8, 8), run_lengths(pixels))
    right = figures("segmentation", [Reply(instances=(nucleus,))], [Reply(instances=(nucleus,))])
    assert right["foreground_iou"][0] == 1 and right["ap50"][0] == pytest.approx(1)
    pixels[2:4] = False
    part = Instance("nucleus", (8, 8), run_lengths(pixels), 0.5)
    assert figures("segmentation", [Reply(instances=(part,))], [Reply(instances=(nucleus,))])["pooled_foreground_iou"][0] == 0.5


def test_recommendation_is_judged_as_a_ranking():
    def items(*ids):
        return Reply(items=tuple(map(RankedItem, ids)))

    many = [f"other {number}" for number in range(9)]
    found = figures("recommendation", [items("cup", "cup", "lamp"), items(*many, "hat", "cup")], [items("lamp", "hat"), items("cup")])
    # The first user finds one of two, the second one at the eleventh place.
    assert found["recall_at_10"][0] == 0.25 and found["recall_at_20"][0] == 0.75
    assert found["hit_rate_at_10"][0] == 0.5
    assert found["recall_at_10"][1] == 1


def test_text_is_measured_by_its_loss_alone():
    assert TASKS["text"].parse(Reply(" a ")) == " a "
    assert figures("text", ["a"], ["b"]) == {}
