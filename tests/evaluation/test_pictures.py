import io
import sys

import numpy as np
import pytest
from PIL import Image

from megamm.core.masks import run_lengths
from megamm.core.predictions import Box, Instance
from megamm.core.types import Message, Part, Sample
from megamm.evaluation.charts import Curve, precision_chart
from megamm.evaluation.held_out import Place
from megamm.evaluation.pictures import contact_sheet, shown, words_of, write_pictures
from megamm.evaluation.records import Answered, SkippedSample
from megamm.evaluation.report import check_output, make_report
from megamm.tasks.reply import Reply
from tests.support.shards import jpeg

CELL = Box("cell", (5, 5, 25, 20))


def record(task, number, reference, answer):
    names = {"dataset": "x", "task": task, "shard": "a.tar", "number": number, "key": f"{task}{number}"}
    return Answered(**names, reference=reference, answer=answer)


def nucleus(shift=0):
    pixels = np.zeros((30, 40), dtype=bool)
    pixels[5 + shift : 15 + shift, 5:25] = True
    return Instance("nucleus", (30, 40), run_lengths(pixels), 0.9)


RECORDS = [
    *(record("classification", number, Reply("abc"[number % 3]), Reply("abd"[number % 3])) for number in range(30)),
    *(record("detection", 30 + number, Reply(boxes=(CELL,)), Reply(boxes=(CELL,) if number else ())) for number in range(4)),
    *(record("segmentation", 40 + number, Reply(instances=(nucleus(),)), Reply(instances=(nucleus(number),))) for number in range(3)),
    record("speech_recognition", 50, Reply("one"), Reply("two")),
]


def samples(places):
    content = (Part("mask", member="1.png"), Part("image", member="0.png"), Part("text", text="?"))
    for place in places:
        if place.number == 31:
            yield place, SkippedSample(dataset="x", shard="a.tar", number=31, key="k", reason="damaged")
        else:
            media = {"1.png": b"no picture", "0.png": jpeg(40, 30, seed=place.number, format="PNG")}
            content = content if place.number != 50 else (Part("audio", member="0.wav"),)
            yield place, Sample("k", "t", (Message("user", content),), media)


@pytest.fixture
def places(tmp_path):
    return [Place("x", tmp_path / "a.tar", number) for number in range(60)]


def test_what_there_is_to_draw_is_drawn(tmp_path, places):
    report = make_report(RECORDS, [], source="here", step=1, settings={})
    chosen = shown(report, places)
    assert len(chosen) == 24 + 4 + 3 + 1
    folder = tmp_path / "report"
    report.write(folder)
    (folder / "samples-old.png").write_bytes(b"of an earlier report")
    (folder / ".samples-x-detection.png.77.tmp").write_bytes(b"of one that was killed")
    check_output(folder)
    written = write_pictures(report, folder, samples(chosen))
    names = {
        *(f"samples-x-{task}.png" for task in ("classification", "detection", "segmentation")),
        "confusion-x-classification.png",
        *(f"precision-x-{task}.png" for task in ("detection", "segmentation")),
    }
    assert {path.name for path in written} == names
    assert {path.name for path in folder.iterdir()} == names | {"report.json", "report.md", "predictions.jsonl"}
    check_output(folder)
    for path in written:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert np.asarray(picture.convert("L")).std() > 1


def test_a_sheet_says_labels_in_their_order_and_counts_what_is_drawn(places):
    several = record("sentiment", 0, Reply("joy, love"), Reply("love, anger\nfear"))
    assert [words_of(several, one) for one in (several.reference, several.answer)] == ["joy, love", "anger fear, love"]
    crowd, unsure = Box("cell", (0, 0, 9, 9), is_crowd=True), Box("cell", (0, 0, 9, 9), 0.2)
    found = record("detection", 1, Reply(boxes=(CELL, crowd)), Reply(boxes=(CELL, unsure)))
    assert words_of(found, found.reference) == words_of(found, found.answer.surer_than(0.5)) == "1 found"
    picture = Image.new("RGB", (40, 30))
    plain, sure = (np.asarray(contact_sheet([(found, picture)], least_score=least)) for least in (0.0, 0.5))
    assert (plain != sure).any()


def test_curves_of_many_classes_leave_room_for_themselves():
    curves = [Curve(f"class {number}  (AP 0.500, n = {number})", (1.0, 0.5, 0.0), (0.2, 0.8, 1.0)) for number in range(28)]
    sizes = {}
    for count in (3, 28):
        with Image.open(io.BytesIO(precision_chart(curves[:count], "x", what=""))) as picture:
            sizes[count] = picture.size
    assert sizes[3][1] == sizes[28][1] and sizes[28][0] > sizes[3][0]


def test_a_task_without_figures_keeps_the_others(tmp_path):
    records = [record("detection", 0, Reply(), Reply(boxes=(CELL,))), record("classification", 1, Reply("a"), Reply("a"))]
    report = make_report(records, [], source="here", step=1, settings={})
    assert {row.task for row in report.rows} == {"classification"}
    assert "x/detection has no figures: " in report.to_markdown()
    assert len(report.records) == 2


def test_a_task_without_figures_has_no_curves(tmp_path):
    flat = Box("cell", (5, 5, 5, 20))
    report = make_report([record("detection", 0, Reply(boxes=(flat,)), Reply(boxes=(CELL,)))], [], source="here", step=1, settings={})
    assert "x/detection" in report.problems
    assert write_pictures(report, tmp_path, []) == []


def test_each_class_of_places_and_of_label_sets_has_figures():
    other = Box("platelet", (1, 1, 9, 9))
    detected = [record("detection", 0, Reply(boxes=(CELL, other)), Reply(boxes=(CELL, Box("dust", (1, 1, 9, 9)))))]
    felt = [
        record("sentiment", 1, Reply("joy, fear"), Reply("joy")),
        record("sentiment", 2, Reply("joy"), Reply("joy")),
    ]
    report = make_report([*detected, *felt], [], source="here", step=1, settings={})
    found = {one.label: (one.ap50, one.recall, one.num_references) for one in report.precisions["x/detection"]}
    assert found == {"cell": (pytest.approx(1), 1, 1), "platelet": (0, 0, 1)}
    assert report.unknown == {"x/detection": {"dust": 1}}
    recalls = {one.label: (one.recall, one.num_references) for one in report.classes["x/sentiment"]}
    assert recalls == {"fear": (0, 1), "joy": (1, 2)}
    words = report.to_markdown()
    assert "| cell | 1 | 1 | 1 | 1 | 1 |" in words and "| fear | 1 | 0 | – | 0 |" in words
    assert "1 places in answers of x/detection have labels that no reference has, and count nowhere: 'dust' (1)." in words
    assert report.to_dict()["precisions"]["x/detection"][0]["label"] == "cell"


def test_classes_named_in_tokens_have_curves_where_the_answer_has_a_probability(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("megamm.evaluation.pictures.precision_chart", lambda curves, name, *, what: drawn.append((name, curves)) or b"png")
    answers = (("a", "a", 0.9), ("a", "b", 0.6), ("b", "b", 0.7), ("b", "a", 0.2))
    one_of_many = [
        record("classification", number, Reply(wanted), Reply(given, probability=sureness))
        for number, (wanted, given, sureness) in enumerate(answers)
    ]
    several = [
        record("sentiment", 8, Reply("joy, fear"), Reply("joy, anger", probability=0.5)),
        record("sentiment", 9, Reply("anger"), Reply("joy", probability=0.9)),
    ]
    without_classes = [record("captioning", 10, Reply("a"), Reply("a", probability=0.5))]
    report = make_report([*one_of_many, *several, *without_classes], [], source="here", step=1, settings={})
    write_pictures(report, tmp_path, [])
    assert [name for name, _ in drawn] == ["x/classification", "x/sentiment"]
    first, second = ([(curve.legend, curve.recalls, curve.precisions) for curve in curves] for _, curves in drawn)
    # From the least sure sample on: of "a" 0.9 is one, 0.2 is none, and the samples that do not name it include its other one.
    assert first[0] == ("a  (AP 0.750, n = 2)", (1.0, 0.5, 0.5, 0.0), (0.5, 0.5, 1.0, 1.0))
    # Anger and joy are each named where they are not; joy more surely than where it is.
    assert [name for name, *_ in second] == ["anger  (AP 0.500, n = 1)", "fear  (AP 0.500, n = 1)", "joy  (AP 0.500, n = 1)"]


def test_labels_may_hold_any_characters(tmp_path):
    names = ("$5", "a$b$\\frac", "c")
    records = [record("classification", number, Reply(name), Reply(name)) for number, name in enumerate(names)]
    report = make_report(records, [], source="here", step=1, settings={})
    assert [path.name for path in write_pictures(report, tmp_path, [])] == ["confusion-x-classification.png"]


def test_charts_that_cannot_be_drawn_are_not_silent(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = make_report([record("classification", 0, Reply("a"), Reply("a"))], [], source="here", step=1, settings={})
    assert write_pictures(report, tmp_path, []) == []
    assert "charts need matplotlib" in caplog.text
