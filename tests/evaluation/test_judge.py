"""Answers that are no text: boxes and instances in source pixels, rankings of items."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megamm.config import Head, Tokenizer
from megamm.core.errors import ConfigError
from megamm.data.shards.index import write_index
from megamm.evaluation.held_out import list_places, read_samples
from megamm.evaluation.judge import check_head, judge
from megamm.evaluation.records import Answered, SkippedSample
from megamm.evaluation.report import make_report
from megamm.tokenizers import text
from megamm.tokenizers.items import ItemTable
from tests.support.shards import as_files, jpeg, write_tar
from tests.support.tiny_run import SENTENCES, random_model, write_run

IMAGE = {"type": "image", "member": "0.png"}
ITEMS = ("cup", "hat", "lamp", "shoe")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    items = ItemTable(ITEMS, ("",) * 4, np.array([[0, 0], [0, 1], [1, 0], [1, 2]], dtype=np.int32), 3)
    pieces = text.train(SENTENCES * 4, Tokenizer(text_size=320, item_levels=2, item_codes=3), folder / "tokenizer", items=items)
    return random_model(folder, pieces=pieces)


def results(loaded, folder, samples):
    write_index(write_tar(folder / "x-0.tar", samples))
    places = list_places({"x": str(folder / "x-*.tar")})
    return list(judge(loaded, read_samples(places), tasks=(), batch_size=2, max_new_tokens=4))


def asked(task, question, answer):
    return {"task": task, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_every_item_is_ranked_for_a_recommendation(loaded, tmp_path):
    def item(name):
        return {"type": "item", "id": name}

    samples = {
        "a": as_files(asked("recommendation", [item("cup"), {"type": "text", "text": "What next?"}], [item("lamp"), item("hat")])),
        "b": as_files(asked("recommendation", [item("shoe")], [item("cup")])),
        "c": as_files(asked("recommendation", [item("unheard of")], [item("cup")])),
    }
    one, other, unknown = sorted(results(loaded, tmp_path, samples), key=lambda result: result.key)
    assert isinstance(unknown, SkippedSample) and "item 'unheard of' is not among the tokenizer's 4 items" in unknown.reason
    for record in (one, other):
        assert isinstance(record, Answered)
        assert sorted(found.id for found in record.answer.items) == list(ITEMS)
        scores = [found.log_probability for found in record.answer.items]
        assert scores == sorted(scores, reverse=True)
    report = make_report([one, other], [], source="here", step=None, settings={})
    values = {row.metric: row for row in report.rows}
    # Four items are all among the first ten.
    assert values["recall_at_10"].value == 1 and values["recall_at_10"].samples == 2


def test_places_are_judged_as_they_are_stored(loaded, tmp_path):
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:15, 5:25] = 1
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    picture = jpeg(40, 30, format="PNG")
    boxes = {"type": "boxes", "image": 0, "boxes": [{"label": "cell", "xyxy": [5, 5, 25, 15]}]}
    outlined = {"type": "mask", "image": 0, "member": "1.png", "labels": ["cell"]}
    samples = {
        "boxes": as_files(asked("detection", [IMAGE], [boxes]), _0_png=picture),
        "none": as_files(asked("detection", [IMAGE], [{**boxes, "boxes": []}]), _0_png=picture),
        "mask": as_files(asked("segmentation", [IMAGE], [outlined]), _0_png=picture, _1_png=file.getvalue()),
        "no mask": as_files(asked("segmentation", [IMAGE], [outlined]), _0_png=picture),
        "blank": as_files(asked("captioning", [IMAGE], [{"type": "text", "text": " \n"}]), _0_png=picture),
    }
    found = {result.key: result for result in results(loaded, tmp_path, samples)}
    assert found["boxes"].reference.boxes[0].xyxy == (5, 5, 25, 15)
    assert found["none"].reference.boxes == ()
    (instance,) = found["mask"].reference.instances
    assert instance.size == (30, 40) and sum(instance.counts[1::2]) == 200
    assert "mask 1.png is missing" in found["no mask"].reason
    assert "the stored answer of captioning is blank" in found["blank"].reason
    records = [result for result in found.values() if isinstance(result, Answered)]
    rows = {(row.task, row.metric): row for row in make_report(records, [], source="here", step=None, settings={}).rows}
    # A model of random weights finds nothing.
    assert rows["detection", "map50"].value == rows["segmentation", "foreground_iou"].value == 0
    assert rows["detection", "map50"].samples == 2


def places(*boxes, label="cell"):
    return {"type": "boxes", "image": 0, "boxes": [{"label": label, "xyxy": list(box)} for box in boxes]}


def png(width, height, value):
    file = io.BytesIO()
    Image.new("L", (width, height), value).save(file, "PNG")
    return file.getvalue()


def said(text):
    return {"type": "text", "text": text}


OUTLINED = {"type": "mask", "image": 0, "member": "1.png", "labels": ["cell"]}
WRONG = {
    "box outside": ("detection", places((0, 0, 41, 4)), "outside its picture of 40 x 30"),
    "text for boxes": ("detection", said("a cell"), "holds a text part, and detection answers with boxes"),
    "text for items": ("recommendation", said("hat"), "holds a text part, and recommendation answers with item"),
    "boxes for a label": ("classification", places((0, 0, 4, 4)), "holds a boxes part, and classification answers with text or label"),
    "no label": ("sentiment", said(" , "), "blank or names nothing"),
    "unknown item": ("recommendation", {"type": "item", "id": "htas"}, "item 'htas' is not among the tokenizer's 4 items"),
    "mask of another size": ("segmentation", OUTLINED, "8 x 8 pixels, its picture 40 x 30"),
}


def test_a_stored_answer_that_cannot_be_right_is_skipped_with_its_reason(loaded, tmp_path):
    media = {"_0_png": jpeg(40, 30, format="PNG"), "_1_png": png(8, 8, 1)}
    samples = {name: as_files(asked(task, [IMAGE], [answer]), **media) for name, (task, answer, _) in WRONG.items()}
    samples["good"] = as_files(asked("detection", [IMAGE], [places((0, 0, 40, 30))]), **media)
    found = {result.key: result for result in results(loaded, tmp_path, samples)}
    assert isinstance(found.pop("good"), Answered)
    reasons = {name: getattr(result, "reason", "judged") for name, result in found.items()}
    assert {name for name, (_, _, part) in WRONG.items() if part not in reasons[name]} == set()


def test_a_head_is_not_asked_for_labels_that_it_does_not_have(tmp_path):
    head = Head("detector", ("cell",), states="vision", hidden_size=16, num_queries=1, num_layers=1)
    picture = jpeg(40, 30, format="PNG")
    samples = {
        "another": as_files(asked("detection", [IMAGE], [places((0, 0, 4, 4), label="cel")]), _0_png=picture),
        "outside": as_files(asked("detection", [IMAGE], [places((0, 0, 4, 31))]), _0_png=picture),
        "more than it finds": as_files(asked("detection", [IMAGE], [places((0, 0, 4, 4), (5, 5, 9, 9))]), _0_png=picture),
    }
    found = {result.key: result for result in results(write_run(tmp_path / "run", head=head), tmp_path, samples)}
    assert "'cel' is not among the 1 of model.head.labels; did you mean 'cell'" in found["another"].reason
    assert "outside its picture" in found["outside"].reason
    # A real miss, which counts.
    assert len(found["more than it finds"].reference.boxes) == 2


def test_several_labels_stand_in_the_order_of_the_head(tmp_path):
    head = Head("linear", ("joy", "fear", "anger"), multi_label=True)
    samples = {
        "one": as_files(asked("sentiment", [said("oh")], [said("anger, joy")])),
        "none": as_files(asked("sentiment", [said("oh")], [said(",")])),
    }
    found = {result.key: result for result in results(write_run(tmp_path / "run", head=head), tmp_path, samples)}
    assert found["one"].reference.text == "joy, anger" and found["none"].reference.text == ""
    answered = [result.answer for result in found.values()]
    for answer in answered:
        assert answer.text == ", ".join(label for label in head.labels if {one.label: one.score for one in answer.labels}[label] >= 0.5)


@pytest.mark.parametrize("head", [None, Head("linear", ("one", "two"))], ids=["tokens", "head"])
def test_what_is_longer_than_the_decoder_is_skipped_with_its_length(tmp_path, head):
    write = write_run(tmp_path / "run", head=head)
    limit = write.config.text_config.max_position_embeddings
    long, short = "1 + 2 = 3, " * limit, "how many?"
    samples = {
        name: as_files(asked("question_answering", [said(text)], [said("two")])) for name, text in (("long", long), ("short", short))
    }
    if head is None:
        samples |= {
            f"{name} text": as_files({"task": "text", "messages": [{"role": "assistant", "content": [said(text)]}]})
            for name, text in (("long", long), ("short", short))
        }
    found = {result.key: getattr(result, "reason", "") for result in results(write, tmp_path, samples)}
    assert {key for key, reason in found.items() if reason} == {key for key in samples if key.startswith("long")}
    assert all(f"the decoder has {limit} positions" in found[key] for key in found if key.startswith("long"))


def test_weights_that_overflow_give_no_answers(loaded, tmp_path):
    broken = random_model(tmp_path / "broken", pieces=loaded.tokenizer)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[loaded.tokenizer.vocabulary.control_id("assistant")] = torch.inf
    samples = {
        "ranked": as_files(asked("recommendation", [{"type": "item", "id": "cup"}], [{"type": "item", "id": "hat"}])),
        "said": as_files(asked("question_answering", [said("how many?")], [said("two")])),
    }
    found = results(broken, tmp_path, samples)
    assert {result.key: getattr(result, "reason", "judged").split(";")[0] for result in found} == dict.fromkeys(
        samples, "the model gives no finite score"
    )


def test_a_head_that_only_fills_in_is_refused():
    with pytest.raises(ConfigError, match="a masked head fills in what is hidden"):
        check_head(Head("masked", states="towers"))
    check_head(Head("linear", ("a", "b")))
    check_head(None)
