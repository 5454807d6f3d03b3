"""Models with a head are evaluated and asked as those that answer in tokens."""

import json

import pytest

from megamm.cli import main
from megamm.config import Head
from megamm.core.errors import ConfigError, DataError
from megamm.data.shards.index import write_index
from megamm.evaluation import evaluate
from megamm.inference.heads import predict as ask
from megamm.inference.load import load_model
from megamm.inference.predict import predict, questions_of
from megamm.metrics.label_precisions import label_precisions
from tests.support.shards import as_files, chat, jpeg, text_document, write_tar
from tests.support.tiny_run import write_run

IMAGE = {"type": "image", "member": "0.png"}
LINEAR = Head("linear", ("zero", "one", "two"))
DETECTOR = Head("detector", ("cell", "platelet"), states="vision", hidden_size=16, num_queries=9, num_layers=1)


def picture(seed):
    return jpeg(20 + seed, 30, seed=seed, format="PNG")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("held_out")
    labels = {f"p{n}": as_files(chat([IMAGE], ["zero", "one", "two"][n % 3]), _0_png=picture(n)) for n in range(7)}
    write_index(write_tar(root / "labels.tar", labels | {"text": as_files(text_document("say one"))}))
    boxes = {"type": "boxes", "image": 0, "boxes": [{"label": "cell", "xyxy": [2, 3, 15, 20]}]}
    turns = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [boxes]}]
    places = {f"d{n}": as_files({"task": "detection", "messages": turns}, _0_png=picture(n)) for n in range(3)}
    write_index(write_tar(root / "places.tar", places))
    return {name: {name: str(root / f"{name}.tar")} for name in ("labels", "places")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("headed")
    for name, head in (("linear", LINEAR), ("detector", DETECTOR)):
        write_run(root / name, head=head)
    return root


def test_labels_of_a_head_are_judged_with_their_scores(runs, datasets, tmp_path):
    report = evaluate(runs / "linear", datasets=datasets["labels"], output=tmp_path, batch_size=3, max_new_tokens=5, changes=["jpeg"])
    assert {record.answer.text for record in report.records} <= set(LINEAR.labels)
    for record in report.records:
        assert sum(label.score for label in record.answer.labels) == pytest.approx(1, abs=1e-5)
        assert record.answer.labels[0].label == record.answer.text
    assert [(one.key, "asks nothing" in one.reason) for one in report.skipped] == [("text", True)]
    assert {"accuracy", "macro_recall"} <= {row.metric for row in report.rows} and len(report.robustness) == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert {"precision-labels-classification.png", "confusion-labels-classification.png", "samples-labels-classification.png"} <= names
    first = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert {label["label"] for label in first["answer"]["labels"]} == set(LINEAR.labels)
    alone = evaluate(runs / "linear", datasets=datasets["labels"], batch_size=1)
    assert [record.answer.text for record in alone.records] == [record.answer.text for record in report.records]


def test_boxes_of_a_head_are_judged_as_those_of_tokens(runs, datasets, tmp_path):
    report = evaluate(runs / "detector", datasets=datasets["places"], output=tmp_path)
    assert {row.metric for row in report.rows} == {"map50", "map", "recall"}
    assert all(len(record.answer.boxes) <= DETECTOR.num_queries for record in report.records)
    assert (tmp_path / "precision-places-detection.png").is_file()


def test_an_answer_of_another_kind_than_the_heads_is_named(runs, datasets):
    report = evaluate(runs / "detector", datasets={**datasets["places"], **datasets["labels"]})
    reasons = {one.key: one.reason for one in report.skipped}
    assert len(reasons) == 8 and "the answer holds a text part, and a detector head answers with boxes" in reasons["p0"]


def test_files_are_put_to_the_head(runs, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(4))
    loaded = load_model(runs / "linear", device="cpu")
    (found,) = predict(loaded, "classification", questions_of([tmp_path / "a.png"], (), ""))
    assert found.reply.text in LINEAR.labels and len(found.reply.labels) == 3
    main(["predict", str(runs / "detector"), str(tmp_path / "a.png"), "--task", "detection", "--draw", str(tmp_path / "drawn")])
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == [str(tmp_path / "a.png")] and {box["label"] for box in said.get("boxes", [])} <= set(DETECTOR.labels)
    assert list((tmp_path / "drawn").glob("*-a.png"))


def test_a_question_that_lacks_what_the_head_looks_at_is_refused(runs):
    with pytest.raises(DataError, match="holds 0 image parts, and this detector head looks at exactly 1"):
        list(predict(load_model(runs / "detector", device="cpu"), "detection", questions_of([], (), "where?")))


def test_a_head_takes_no_beams(runs):
    with pytest.raises(ConfigError, match="num_beams=50 searches items, and this model's head ranks none"):
        evaluate(runs / "detector", num_beams=50, device="cpu")


def test_no_question_at_all_runs_the_head_on_nothing(runs):
    assert ask(load_model(runs / "detector", device="cpu"), []) == []


def test_precision_of_labels_is_that_of_the_field():
    scores = [{"a": 0.9, "b": 0.1}, {"a": 0.8, "b": 0.7}, {"a": 0.3}]
    one, other = label_precisions(scores, [{"a"}, {"b"}, {"a", "b"}])
    # Found in the order of scores: right, wrong, right.
    assert (one.label, one.num_references) == ("a", 2) and one.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert other.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert one.precisions[0] == pytest.approx(2 / 3) and one.recalls[0] == 1
